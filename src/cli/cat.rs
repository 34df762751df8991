//! `clip-csi cat`: the bytes of files, and no others.

use std::io::{self, Write};

use clap::Args;

use super::args::OpenArgs;
use super::ls::resolve;
use super::{CliError, human};
use crate::archive::{Kind, NodeId};
use crate::fs::ImageFs;

/// Bytes per read: as much as the kernel asks for at once.
const CHUNK: usize = 1 << 20;

/// Print files of an archive; only their bytes are fetched
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi cat app.clip /etc/os-release
  clip-csi cat s3://bucket/images/app.clip /app/model.bin | sha256sum")]
pub(super) struct CatArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// The files' paths inside the archive
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
}

impl CatArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let archive = self.open.open().await?;
        let fs = &archive.opened.fs;
        for path in &self.paths {
            let node = resolve(fs.tree(), fs.root(), path, true)?;
            let attr = fs.tree().attr(node);
            if attr.kind != Kind::File {
                let mode = human::mode(attr.kind, attr.mode);
                return Err(CliError::Usage(format!("{path} is no regular file ({mode}); name a file")));
            }
            copy(fs, node, attr.size, path).await?;
        }
        io::stdout().flush().map_err(|e| CliError::output(&e))
    }
}

async fn copy(fs: &ImageFs, node: NodeId, size: u64, path: &str) -> Result<(), CliError> {
    let mut off = 0;
    while off < size {
        let bytes = fs.fetch(node, off, CHUNK).await?;
        if bytes.is_empty() {
            return Err(CliError::Corrupt(format!(
                "{path} ends at byte {off}, its size is {size}; build the archive again"
            )));
        }
        io::stdout().write_all(&bytes).map_err(|e| CliError::output(&e))?;
        off += bytes.len() as u64;
    }
    Ok(())
}
