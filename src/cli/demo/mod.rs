//! `clip-csi demo`: the whole way, from an image to files that a pod reads, on this machine alone.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::error::signal;
use super::{CliError, human};
use crate::build::progress::Silent;
use crate::build::{BuildOptions, archive_image, index_image};
use crate::source::{Credentials, ImageRef, Policy, Sources};
use crate::units::{Digest, Platform};
use image::DemoImage;
use model::Model;
use plugin::{Plugin, Workplace};

mod image;
mod library;
mod model;
mod plugin;
mod report;

/// Fetched by range requests, over all sources.
const FETCHED: &str = "clip_range_get_bytes_total";
/// How many differences are named where the trees differ.
const DIFFERENCES: usize = 5;

/// Show it all on this machine: build, publish as the kubelet does, read, compare
#[derive(Debug, Args)]
#[command(after_help = "\
Makes a real image of this machine's /usr in a temporary directory, archives it as v1 and indexes it as v2, starts the
node plugin and does what a kubelet does over gRPC. The published tree must equal the image's, computed independently.
Nothing stays mounted, running or on disk. Without root or /dev/fuse the same reads go through the library.")]
pub(super) struct DemoArgs {
    /// Read through the library even where a mount is possible
    #[arg(long)]
    library: bool,
    /// Size of the image's files, in MiB
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=4096))]
    size_mib: u64,
}

/// One archive of the image.
struct Archive {
    name: &'static str,
    path: PathBuf,
    bytes: u64,
    built: Duration,
}

/// What was seen of one archive.
struct Seen {
    detected_from: String,
    publish: Duration,
    first_byte: Duration,
    /// Bytes fetched once the probe file was read.
    fetched_probe: u64,
    /// Bytes fetched once everything was read.
    fetched_all: u64,
    read_all: Duration,
    tree: Digest,
    differences: Vec<String>,
    /// What NodeGetVolumeStats said; `None`: not asked (library).
    stats: Option<String>,
}

impl DemoArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let started = Instant::now();
        let blocked = if self.library { Some("as asked by --library".to_owned()) } else { no_mounts() };
        report::opening(blocked.as_deref());
        let workplace = Workplace::new()?;
        let root = workplace.path().to_owned();
        let outcome = tokio::select! {
            outcome = self.show(&workplace, blocked.is_some()) => outcome,
            signal = signal() => Err(signal.map_or_else(|e| e, |_| CliError::Interrupted)),
        };
        let left = workplace.mounts();
        drop(workplace);
        let good = outcome?;
        if !left.is_empty() || root.exists() {
            return Err(CliError::Failed(format!("the demo left something behind: {left:?} {}", root.display())));
        }
        report::closing(good, started.elapsed());
        if good { Ok(()) } else { Err(CliError::Corrupt("a published tree differs from the image's".into())) }
    }

    /// Gives whether every tree equals the image's.
    async fn show(&self, workplace: &Workplace, library: bool) -> Result<bool, CliError> {
        let root = workplace.path();
        let layout = root.join("layout");
        let image = {
            let (layout, bytes) = (layout.clone(), self.size_mib << 20);
            let made = tokio::task::spawn_blocking(move || image::make(&layout, bytes)).await;
            let made = made.map_err(|e| CliError::Failed(format!("making the image: {e}")))?;
            made.map_err(|e| CliError::io("making the image", &e))?
        };
        report::image(&image);
        let archives = build(root, &layout).await?;
        let mut seen = Vec::new();
        if library {
            for archive in &archives {
                seen.push(library::read(root, archive, &image).await?);
            }
        } else {
            let mut plugin = Plugin::start(root).await?;
            report::plugin(&mut plugin).await?;
            for archive in &archives {
                match publish(&mut plugin, archive, &image).await {
                    Ok(one) => seen.push(one),
                    Err(error) => return Err(plugin.explain(error).await),
                }
            }
            plugin.stop().await?;
        }
        Ok(report::table(&image, &archives, &seen))
    }
}

/// Why nothing can be mounted here; `None`: it can.
fn no_mounts() -> Option<String> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    if u64::from_str_radix(effective.trim(), 16).unwrap_or(0) & CAP_SYS_ADMIN == 0 {
        return Some("this process may not mount (it lacks CAP_SYS_ADMIN; be root)".into());
    }
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => None,
        Err(e) => Some(format!("/dev/fuse can't be opened ({e})")),
    }
}

/// The same image as v1 and as v2.
async fn build(root: &Path, layout: &Path) -> Result<[Archive; 2], CliError> {
    let sources = Sources::new(Policy { trusted: true, config: Default::default() })?;
    let reference = ImageRef::Layout { dir: layout.to_owned(), tag: Some("demo".into()) };
    let resolved = sources.resolve(&reference, &Platform::host(), &Credentials::default()).await?;
    let options = BuildOptions::default();
    let archive = |name, path: PathBuf, bytes, since: Instant| Archive { name, path, bytes, built: since.elapsed() };

    let (since, path) = (Instant::now(), root.join("demo-v1.clip"));
    let made = archive_image(&resolved, &path, &options, &Silent).await?;
    let v1 = archive("v1", path, made.archive_bytes, since);
    let (since, path) = (Instant::now(), root.join("demo-v2.clip"));
    let made = index_image(&resolved, &path, &options, &Silent).await?;
    let v2 = archive("v2", path, made.archive_bytes, since);
    Ok([v1, v2])
}

/// Publishes one archive as the kubelet does for an inline volume, reads it, unpublishes it.
async fn publish(plugin: &mut Plugin, archive: &Archive, image: &DemoImage) -> Result<Seen, CliError> {
    let failed = |e: crate::csi::client::ClientError| CliError::Failed(e.to_string());
    let volume = format!("csi-demo-{}", archive.name);
    let pod = plugin.kubelet.join("pods").join(&volume).join("volumes/kubernetes.io~csi/image");
    std::fs::create_dir_all(&pod).map_err(|e| CliError::io(pod.display().to_string(), &e))?;
    let target = pod.join("mount");
    let attributes = HashMap::from([
        ("archive".to_owned(), format!("file://{}", archive.path.display())),
        ("csi.storage.k8s.io/ephemeral".to_owned(), "true".to_owned()),
        ("csi.storage.k8s.io/pod.name".to_owned(), "demo".to_owned()),
    ]);
    let before = plugin.metric(FETCHED).await?;
    let since = Instant::now();
    plugin.client.publish(&volume, &target, attributes).await.map_err(failed)?;
    let publish = since.elapsed();

    let probe = target.join(std::ffi::OsStr::from_bytes(&image.probe));
    let first_byte = blocking("reading the first byte", {
        let probe = probe.clone();
        move || {
            let since = Instant::now();
            File::open(&probe)?.read_exact(&mut [0])?;
            Ok(since.elapsed())
        }
    })
    .await?;
    blocking("reading one file", move || std::fs::read(&probe).map(|_| ())).await?;
    let fetched_probe = plugin.metric(FETCHED).await? - before;
    let (seen, read_all) = blocking("reading the published tree", {
        let target = target.clone();
        move || {
            let since = Instant::now();
            Ok((Model::of_dir(&target)?, since.elapsed()))
        }
    })
    .await?;
    let fetched_all = plugin.metric(FETCHED).await? - before;
    let usage = plugin.client.stats(&volume, &target).await.map_err(failed)?;
    plugin.client.unpublish(&volume, &target).await.map_err(failed)?;
    if target.exists() {
        return Err(CliError::Failed(format!("{} is still there after NodeUnpublishVolume", target.display())));
    }
    let health = usage.abnormal.unwrap_or_else(|| "healthy".into());
    Ok(Seen {
        detected_from: plugin.detected_from(),
        publish,
        first_byte,
        fetched_probe,
        fetched_all,
        read_all,
        tree: seen.digest(),
        differences: image.model.differences(&seen, DIFFERENCES),
        stats: Some(format!(
            "{}, {} inodes, {health}",
            human::bytes(usage.bytes.unsigned_abs()),
            human::count(usage.inodes.unsigned_abs())
        )),
    })
}

/// The kernel's answers come from a process of their own, but nobody waits for them on the runtime's threads.
async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| CliError::Failed(format!("{what}: {e}")))?.map_err(|e| CliError::io(what, &e))
}
