//! `clip-csi mount`: an archive at a directory of this machine, until a signal.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::args::OpenArgs;
use super::error::signal;
use super::{CliError, human};
use crate::fs::fuse::{FuseOptions, FuseServer};

/// Mount an archive until Ctrl-C
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi mount app.clip /mnt
  clip-csi mount s3://bucket/images/app.clip /mnt --cache-dir /var/cache/clip

Needs root and /dev/fuse. Runs in the foreground and unmounts at SIGINT or SIGTERM.")]
pub(super) struct MountArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// The directory to mount at; it must exist
    dir: PathBuf,
}

impl MountArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let started = Instant::now();
        let dir = self.dir.canonicalize().map_err(|e| CliError::io(self.dir.display().to_string(), &e))?;
        if !dir.is_dir() {
            return Err(CliError::Usage(format!("{} is no directory; name an existing directory", dir.display())));
        }
        // From here on a signal is an order to unmount, not to die.
        let mut ended = std::pin::pin!(signal());
        let archive = tokio::select! {
            archive = self.open.open() => archive?,
            _ = &mut ended => return Err(CliError::Interrupted),
        };
        let runtime = tokio::runtime::Handle::current();
        let fs = archive.opened.fs.clone();
        let server = FuseServer::mount(fs, &dir, &FuseOptions::default(), runtime)
            .map_err(|e| CliError::io(format!("mounting at {} (it takes root and /dev/fuse)", dir.display()), &e))?;
        println!(
            "{} is mounted at {} ({}, {} names) after {}; Ctrl-C unmounts",
            self.open.archive,
            dir.display(),
            archive.opened.detected_from,
            human::count(archive.opened.fs.tree().len() as u64),
            human::duration(started.elapsed()),
        );
        tokio::select! {
            signal = &mut ended => tracing::info!(signal = signal?, "unmounting"),
            () = server.ended() => tracing::info!("unmounted by somebody else"),
        }
        let unmounted = tokio::task::spawn_blocking(move || server.unmount()).await;
        unmounted
            .map_err(|e| CliError::Failed(format!("unmounting {}: {e}", dir.display())))?
            .map_err(|e| CliError::io(format!("unmounting {}", dir.display()), &e))
    }
}
