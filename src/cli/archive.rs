//! `clip-csi archive`: a v1 archive, with the data in it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::args::{self, SourceArgs};
use super::bars::Bars;
use super::index::{BuildArgs, resolve, summarise};
use super::{CliError, Global};
use crate::build::{BuildOptions, archive_dir, archive_image};

/// Archive a directory or an image together with its data (v1)
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi archive ./rootfs -o rootfs.clip
  clip-csi archive python:3.12-slim -o python.clip
  clip-csi archive oci:./layout:v3 -o app.clip

An existing directory is archived as it is; anything else is an image, archived as an OCI bundle (the image's root is
/rootfs). For a directory that is an OCI layout write oci:DIR.")]
pub(super) struct ArchiveArgs {
    /// A directory, or an image: registry/repo:tag, registry/repo@sha256:…, oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    #[arg(value_name = "DIR|IMAGE")]
    what: String,
    /// Write the archive here
    #[arg(short, long, value_name = "OUT.clip")]
    output: PathBuf,
    #[command(flatten)]
    build: BuildArgs,
    #[command(flatten)]
    sources: SourceArgs,
}

impl ArchiveArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let options = BuildOptions { span_size: self.build.span_kib << 10, ..Default::default() };
        let dir = Path::new(&self.what);
        let bars = Bars::new(global);
        let (report, layers) = if dir.is_dir() {
            if dir.join("oci-layout").is_file() {
                eprintln!("clip-csi: warning: {0} is an OCI layout; to archive its image write oci:{0}", self.what);
            }
            (archive_dir(dir, &self.output, &options, &bars).await?, 0)
        } else if is_path(&self.what) {
            return Err(CliError::NotFound(format!(
                "{} is no directory; name an existing directory, or an image like oci:DIR or registry/repo:tag",
                self.what
            )));
        } else {
            let image = args::image(&self.what).map_err(CliError::Usage)?;
            let image = resolve(&image, &self.build, &self.sources).await?;
            (archive_image(&image, &self.output, &options, &bars).await?, image.layers.len())
        };
        drop(bars);
        summarise("v1", &self.output, &report, layers, started);
        Ok(())
    }
}

/// Can only be meant as a path: no image reference begins so.
fn is_path(text: &str) -> bool {
    text.starts_with(['/', '.', '~']) || text.ends_with('/')
}

#[cfg(test)]
mod tests {
    use super::is_path;

    #[test]
    fn what_can_only_be_a_path_is_not_taken_for_an_image() {
        assert!(["/a", "./a", "../a", "a/"].into_iter().all(is_path));
        assert!(!["a", "a/b", "oci:/a", "r.example:5000/a:b"].into_iter().any(is_path));
    }
}
