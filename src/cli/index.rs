//! `clip-csi index`: a v2 archive, an index over the layers of an image.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::args::{self, SourceArgs};
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::build::{BuildOptions, BuildReport, index_image};
use crate::source::{ImageRef, ResolvedImage};
use crate::units::Platform;

/// Index an image: the archive is small, the layers stay where they are (v2)
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi index python:3.12-slim -o python.clip
  clip-csi index ghcr.io/acme/app@sha256:… -o app.clip --platform linux/arm64
  clip-csi index oci:./layout:v3 -o app.clip --store-as ghcr.io/acme/app:v3

Each layer is streamed once and checked against its digest. An index of a layout says where the layers lie on this
machine, unless --store-as names the registry that they will be pushed to.")]
pub(super) struct IndexArgs {
    /// The image: registry/repo:tag, registry/repo@sha256:…, oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    #[arg(value_parser = args::image)]
    image: ImageRef,
    /// Write the archive here
    #[arg(short, long, value_name = "OUT.clip")]
    output: PathBuf,
    #[command(flatten)]
    build: BuildArgs,
    /// Distance of the checkpoints that the Go module reads, in MiB
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=1024))]
    checkpoint_mib: u64,
    /// Stream every layer, also those that carry a table of contents (eStargz, zstd:chunked): slower; the Go module can then read them
    #[arg(long)]
    no_toc: bool,
    /// The registry reference under which the layers will be found
    #[arg(long, value_name = "REF", value_parser = args::image)]
    store_as: Option<ImageRef>,
    #[command(flatten)]
    sources: SourceArgs,
}

/// What both kinds of builds take.
#[derive(Debug, Clone, Args)]
pub(super) struct BuildArgs {
    /// The platform, where the image has several [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(super) platform: Option<Platform>,
    /// Uncompressed bytes that are fetched and verified as one, in KiB (a power of two)
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = span_kib)]
    pub(super) span_kib: u64,
}

fn span_kib(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(n) if n.is_power_of_two() && (64..=16384).contains(&n) => Ok(n),
        _ => Err("write a power of two from 64 to 16384".into()),
    }
}

impl IndexArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let image = resolve(&self.image, &self.build, &self.sources).await?;
        let options = BuildOptions {
            span_size: self.build.span_kib << 10,
            checkpoint_mib: self.checkpoint_mib,
            tables_of_contents: !self.no_toc,
            store_as: self.store_as,
        };
        let report = {
            let bars = Bars::new(global);
            index_image(&image, &self.output, &options, &bars).await?
        };
        summarise("v2", &self.output, &report, image.layers.len(), started);
        Ok(())
    }
}

/// Resolves at the shell: the user's own credentials.
pub(super) async fn resolve(
    image: &ImageRef,
    build: &BuildArgs,
    sources: &SourceArgs,
) -> Result<ResolvedImage, CliError> {
    let platform = build.platform.clone().unwrap_or_else(Platform::host);
    Ok(sources.sources()?.resolve(image, &platform, &sources.credentials()?).await?)
}

/// Warnings on stderr, one line on stdout.
pub(super) fn summarise(version: &str, out: &std::path::Path, report: &BuildReport, layers: usize, started: Instant) {
    for warning in &report.warnings {
        eprintln!("clip-csi: warning: {warning}");
    }
    let of = if layers == 0 {
        String::new()
    } else {
        let plural = if layers == 1 { "" } else { "s" };
        format!(" of {layers} layer{plural} ({} compressed)", human::bytes(report.layer_bytes))
    };
    println!(
        "{}: {version}, {}; {} names, {} of files{of}; {}",
        out.display(),
        human::bytes(report.archive_bytes),
        human::count(report.nodes),
        human::bytes(report.content_bytes),
        human::duration(started.elapsed()),
    );
}
