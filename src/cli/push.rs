//! `clip-csi push`: an archive to S3 or to a file.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use tokio::io::AsyncReadExt;

use super::args::SourceArgs;
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::archive::{HEADER_LEN, Header};
use crate::build::progress::Progress;
use crate::source::Location;

/// Store an archive in S3
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi push app.clip s3://bucket/images/app.clip
  clip-csi push app.clip s3://bucket/images/ --create-only
  clip-csi push app.clip 's3://bucket/app.clip?endpoint=http://127.0.0.1:9000&path-style=true'

Credentials are found as the AWS SDK finds them: environment, ~/.aws, web identity, instance role.")]
pub(super) struct PushArgs {
    /// The archive file
    archive: PathBuf,
    /// s3://bucket/key, file://PATH or a path; one that ends with / gets the archive's file name
    dest: String,
    /// Fail where the destination exists already
    #[arg(long)]
    create_only: bool,
    #[command(flatten)]
    sources: SourceArgs,
}

impl PushArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let what = self.archive.display().to_string();
        let size = check(&self.archive).await?;
        let mut text = self.dest.clone();
        if text.ends_with('/') {
            let name = self.archive.file_name().and_then(|n| n.to_str());
            text +=
                name.ok_or_else(|| CliError::Usage(format!("{what} has no file name; name the destination in full")))?;
        }
        let dest = self.sources.location(&text)?;
        if !matches!(dest, Location::S3 { .. } | Location::File(_)) {
            return Err(CliError::Usage(format!("{text} is no place for an archive; write s3://bucket/key or a path")));
        }
        let sources = self.sources.sources()?;
        let credentials = self.sources.credentials()?;
        {
            let bars = Bars::new(global);
            let id = bars.begin(&what, Some(size));
            let advance = |bytes| bars.advance(id, bytes);
            sources.put(&dest, &self.archive, self.create_only, &credentials, &advance).await?;
            bars.end(id);
        }
        println!("{what} -> {text}: {} in {}", human::bytes(size), human::duration(started.elapsed()));
        Ok(())
    }
}

/// The file is an archive; gives its size.
async fn check(path: &std::path::Path) -> Result<u64, CliError> {
    let what = path.display().to_string();
    let io = |e: std::io::Error| CliError::io(what.clone(), &e);
    let file = tokio::fs::File::open(path).await.map_err(io)?;
    let size = file.metadata().await.map_err(io)?.len();
    let mut header = Vec::with_capacity(HEADER_LEN);
    file.take(HEADER_LEN as u64).read_to_end(&mut header).await.map_err(io)?;
    Header::decode(&header).map_err(|source| CliError::Archive { what: what.clone(), source })?;
    Ok(size)
}
