//! `clip-csi index`: a v2 archive, an index over the layers of an image.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use super::args::{self, SourceArgs};
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::build::{Artifacts, BuildOptions, BuildReport, DEFAULT_SPAN_KIB, Indexing, index_image, is_span_kib};
use crate::source::{ImageRef, ResolvedImage};
use crate::units::Platform;

/// Limit in bytes of what is kept of indexed layers.
const LAYER_CACHE_MAX_BYTES: u64 = 1 << 30;

/// Index an image: the archive is small, the layers stay where they are (v2)
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi index python:3.12-slim -o python.clip
  clip-csi index ghcr.io/acme/app@sha256:… -o app.clip --platform linux/arm64
  clip-csi index oci:./layout:v3 -o app.clip --store-as ghcr.io/acme/app:v3

Each layer is streamed once and checked against its digest. What was found is kept in the cache directory, so that a layer
that comes again, in another image or after an interruption, is not streamed again. An index of a layout says where the layers lie on this
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
    /// Layers that are streamed at a time [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Option<u16>,
    /// Where what was found in layers is kept, 1 GiB at most [default: $XDG_CACHE_HOME/clip-csi, ~/.cache/clip-csi]
    #[arg(long, value_name = "DIR", conflicts_with = "no_cache")]
    cache_dir: Option<PathBuf>,
    /// Stream every layer, and keep nothing of it
    #[arg(long)]
    no_cache: bool,
    #[command(flatten)]
    sources: SourceArgs,
}

/// What both kinds of builds take.
#[derive(Debug, Clone, Args)]
pub(super) struct BuildArgs {
    /// The platform, where the image has several [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(super) platform: Option<Platform>,
    /// Uncompressed bytes that are fetched and verified as one, in KiB (a multiple of 64)
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SPAN_KIB, value_parser = span_kib)]
    pub(super) span_kib: u64,
}

fn span_kib(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(n) if is_span_kib(n) => Ok(n),
        _ => Err("write a multiple of 64 from 64 to 16384".into()),
    }
}

impl IndexArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let image = resolve(&self.image, &self.build, &self.sources).await?;
        let artifacts = self.layer_cache().map(|dir| Artifacts::new(dir, LAYER_CACHE_MAX_BYTES));
        let options = BuildOptions {
            indexing: Arc::new(Indexing::new(self.concurrency.unwrap_or(0).into(), artifacts, u64::MAX)),
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

impl IndexArgs {
    /// Where artifacts of layers lie; `None`: nowhere.
    fn layer_cache(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let user = || {
            let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
            Some(cache.join("clip-csi"))
        };
        self.cache_dir.clone().or_else(user).map(|dir| dir.join("layers"))
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
