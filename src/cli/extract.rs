//! `clip-csi extract`: the tree, unpacked.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::args::OpenArgs;
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::build::progress::Progress;

/// Unpack an archive into a directory
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi extract app.clip ./rootfs
  clip-csi extract --root archive s3://bucket/images/app.clip ./bundle

Owners, devices and all modes are kept where this runs as root. No symlink of the archive is followed while unpacking.")]
pub(super) struct ExtractArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// The directory: empty, or made (its parent must exist)
    dir: PathBuf,
}

impl ExtractArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let archive = self.open.open().await?;
        let fs = &archive.opened.fs;
        let done = {
            let bars = Bars::new(global);
            let id = bars.begin(&self.open.archive, Some(fs.statfs().bytes));
            let done = crate::fs::extract(fs, &self.dir, &|bytes| bars.advance(id, bytes)).await?;
            bars.end(id);
            done
        };
        for warning in &done.warnings {
            eprintln!("clip-csi: warning: {warning}");
        }
        println!(
            "{}: {} names, {} in {}",
            self.dir.display(),
            human::count(done.names),
            human::bytes(done.bytes),
            human::duration(started.elapsed())
        );
        Ok(())
    }
}
