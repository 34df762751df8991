//! `clip-csi inspect`: what an archive is, in text and in JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;

use super::args::{OpenArchive, OpenArgs};
use super::{CliError, human};
use crate::archive::{Kind, NodeId, SeekTable, Storage, Tree, Version};
use crate::source::Location;
use crate::units::{Digest, Platform};

/// Of the JSON below. Fields may be added under the same number; none changes its meaning or goes.
const SCHEMA: u32 = 1;
/// A seek table over this many bytes is not fetched just to be shown: 1 GiB of it would describe tens of terabytes.
const MAX_SEEK_TABLE: u64 = 1 << 30;

/// Show what an archive is: version, storage, layers, sizes, image
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi inspect app.clip
  clip-csi inspect --json s3://bucket/images/app.clip | jq .layers

Header, index, storage info and seek table are fetched; no file data.")]
pub(super) struct InspectArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// Print JSON; its fields are stable
    #[arg(long)]
    json: bool,
}

/// All that is shown.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    schema: u32,
    archive: String,
    /// `v1` or `v2`.
    version: &'static str,
    detected_from: String,
    /// SHA-256 over header, index and storage info.
    digest: Digest,
    archive_bytes: u64,
    /// The archive holds an OCI bundle and `/rootfs` is shown.
    bundle: bool,
    storage: StorageReport,
    tree: TreeReport,
    /// In order, lowest first; the data region of a v1 archive counts as one.
    layers: Vec<LayerReport>,
    extension: Option<ExtensionReport>,
    integrity: IntegrityReport,
    image: Option<ImageReport>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase", rename_all_fields = "camelCase")]
enum StorageReport {
    Local,
    S3 { bucket: String, key: String, region: String, endpoint: String, path_style: bool },
    Oci { registry: String, repository: String, reference: String, layout: Option<String> },
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct TreeReport {
    names: u64,
    inodes: u64,
    files: u64,
    directories: u64,
    symlinks: u64,
    /// Fifos, sockets, devices.
    special: u64,
    /// Names beyond the first of each hard-linked file.
    hard_links: u64,
    content_bytes: u64,
    /// What the tree takes in the memory of a node that mounts it.
    memory_bytes: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LayerReport {
    digest: String,
    /// `gzip`, `zstd`, `none`; `null` where the archive does not say.
    compression: Option<String>,
    compressed_bytes: Option<u64>,
    uncompressed_bytes: Option<u64>,
    /// Spans that can be fetched and verified by themselves; 0: the layer has to be fetched as a whole.
    spans: u64,
    /// Indexed by a table of contents of its own (eStargz, zstd:chunked): its uncompressed bytes are those of its files only.
    table_of_contents: bool,
    /// Checkpoints of the Go module.
    checkpoints: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ExtensionReport {
    generator: String,
    manifest_digest: Option<Digest>,
    platform: Option<Platform>,
    seek_table_bytes: Option<u64>,
    seek_table_digest: Option<Digest>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct IntegrityReport {
    /// `spans`: every byte is verified before it is served. `layers`: whole layers are verified. `files`: whole files only.
    /// `none`: part of the files has no digest.
    covered: &'static str,
    says: &'static str,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct ImageReport {
    name: String,
    digest: String,
    tags: Vec<String>,
    created: Option<String>,
    architecture: String,
    os: String,
    variant: String,
    author: String,
    user: String,
    working_dir: String,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    exposed_ports: Vec<String>,
    volumes: Vec<String>,
    stop_signal: String,
    labels: BTreeMap<String, String>,
}

impl InspectArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let report = report(&self.open, &self.open.open().await?).await?;
        let text = if self.json {
            let json = serde_json::to_string_pretty(&report);
            json.map_err(|e| CliError::Failed(format!("writing JSON: {e}")))? + "\n"
        } else {
            text(&report)
        };
        io::stdout().write_all(text.as_bytes()).map_err(|e| CliError::output(&e))
    }
}

async fn report(args: &OpenArgs, open: &OpenArchive) -> Result<Report, CliError> {
    let archive = &open.opened.archive;
    let table = seek_table(args, open).await?;
    let extension = archive.extension.as_ref();
    Ok(Report {
        schema: SCHEMA,
        archive: args.archive.clone(),
        version: version(archive.version()),
        detected_from: open.opened.detected_from.clone(),
        digest: archive.digest,
        archive_bytes: open.source.stat().await?.size,
        bundle: open.opened.bundle,
        storage: match &archive.storage {
            Storage::Local => StorageReport::Local,
            Storage::S3(s3) => StorageReport::S3 {
                bucket: s3.bucket.clone(),
                key: s3.key.clone(),
                region: s3.region.clone(),
                endpoint: s3.endpoint.clone(),
                path_style: s3.force_path_style,
            },
            Storage::Oci(oci) => StorageReport::Oci {
                registry: oci.registry_url.clone(),
                repository: oci.repository.clone(),
                reference: oci.reference.clone(),
                layout: extension.and_then(|e| e.layout.clone()),
            },
        },
        tree: tree_report(open.opened.fs.tree()),
        layers: layers(&archive.storage, table.as_ref()),
        integrity: integrity(&archive.storage, table.is_some(), open.opened.fs.tree()),
        extension: extension.map(|e| ExtensionReport {
            generator: e.generator.clone(),
            manifest_digest: e.manifest_digest,
            platform: e.platform.clone(),
            seek_table_bytes: e.seek_table.as_ref().map(|(_, len, _)| *len),
            seek_table_digest: e.seek_table.as_ref().map(|(_, _, digest)| *digest),
        }),
        image: image(&archive.storage),
    })
}

fn version(version: Version) -> &'static str {
    match version {
        Version::V1 => "v1",
        Version::V2 => "v2",
    }
}

/// The seek table, checked against the digest that the index holds.
async fn seek_table(args: &OpenArgs, open: &OpenArchive) -> Result<Option<SeekTable>, CliError> {
    let archive = &open.opened.archive;
    let Some((position, len, digest)) = archive.extension.as_ref().and_then(|e| e.seek_table) else { return Ok(None) };
    if len > MAX_SEEK_TABLE {
        return Err(CliError::Corrupt(format!("{}: its seek table claims {len} bytes; build it again", args.archive)));
    }
    let end = position.saturating_add(len);
    let bytes = match &archive.storage {
        // The index of a remote archive counts positions in the object that it names.
        Storage::S3(s3) => {
            let object = Location::S3 {
                endpoint: s3.endpoint.clone(),
                region: s3.region.clone(),
                bucket: s3.bucket.clone(),
                key: s3.key.clone(),
                path_style: s3.force_path_style,
            };
            open.sources.open(&object, &open.credentials).await?.read_range(position..end).await?
        }
        Storage::Local | Storage::Oci(_) => open.source.read_range(position..end).await?,
    };
    if Digest::of(&bytes) != digest {
        let remedy = "fetch or build the archive again";
        return Err(CliError::Corrupt(format!("{}: its seek table is not {digest}; {remedy}", args.archive)));
    }
    let table = SeekTable::decode(&bytes);
    table.map(Some).map_err(|source| CliError::Archive { what: args.archive.clone(), source })
}

fn tree_report(tree: &Tree) -> TreeReport {
    let mut report = TreeReport {
        names: tree.len() as u64,
        inodes: tree.inodes() as u64,
        content_bytes: tree.total_size(),
        memory_bytes: tree.memory() as u64,
        ..Default::default()
    };
    for id in (0..tree.len() as u32).map(NodeId) {
        let count = match tree.attr(id).kind {
            Kind::File => &mut report.files,
            Kind::Dir => &mut report.directories,
            Kind::Symlink => &mut report.symlinks,
            Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => &mut report.special,
        };
        *count += 1;
    }
    report.hard_links = report.names - report.inodes;
    report
}

fn layers(storage: &Storage, table: Option<&SeekTable>) -> Vec<LayerReport> {
    let of_table = |blob: &crate::archive::BlobTable| LayerReport {
        digest: blob.digest.to_string(),
        compression: Some(blob.compression.to_string()),
        compressed_bytes: Some(blob.clen),
        uncompressed_bytes: Some(blob.ulen),
        spans: blob.spans.len() as u64,
        table_of_contents: blob.chunks.is_some(),
        checkpoints: 0,
    };
    let Storage::Oci(oci) = storage else {
        return table.map(|t| t.blobs.iter().map(of_table).collect()).unwrap_or_default();
    };
    let stored = oci.image.as_ref().map(|i| i.layers_data.as_slice()).unwrap_or_default();
    let layer = |(i, digest): (usize, &String)| {
        let (gzip, zstd) = (oci.gzip_checkpoints.get(digest), oci.zstd_frames.get(digest));
        let mut report = table.and_then(|t| t.blobs.get(i)).map(of_table).unwrap_or_else(|| LayerReport {
            digest: digest.clone(),
            compression: gzip.map(|_| "gzip").or_else(|| zstd.map(|_| "zstd")).map(Into::into),
            compressed_bytes: stored.iter().find(|l| l.digest == *digest).and_then(|l| u64::try_from(l.size).ok()),
            uncompressed_bytes: None,
            spans: 0,
            table_of_contents: false,
            checkpoints: 0,
        });
        report.checkpoints = gzip.map_or_else(|| zstd.map_or(0, Vec::len), Vec::len) as u64;
        report
    };
    oci.layers.iter().enumerate().map(layer).collect()
}

fn integrity(storage: &Storage, table: bool, tree: &Tree) -> IntegrityReport {
    let all_files_have_digests = || {
        (0..tree.len() as u32).map(NodeId).all(|id| {
            let attr = tree.attr(id);
            attr.kind != Kind::File || attr.size == 0 || tree.content_hash(id).is_some()
        })
    };
    let (covered, says) = match (table, storage) {
        (true, _) => ("spans", "every byte is verified before it is served, by a SHA-256 per span"),
        (false, Storage::Oci(_)) => (
            "layers",
            "no seek table: each layer is fetched whole and verified by its digest before its first byte is served",
        ),
        (false, _) if all_files_have_digests() => (
            "files",
            "a digest per file: small files are verified before they are served, part of a large one is not (integrity=strict fetches all of it first)",
        ),
        (false, _) => (
            "none",
            "some files have a checksum only: part of a large file can't be verified (integrity=strict fetches all of it first)",
        ),
    };
    IntegrityReport { covered, says }
}

fn image(storage: &Storage) -> Option<ImageReport> {
    let Storage::Oci(oci) = storage else { return None };
    let image = oci.image.as_ref()?;
    let created = image.created.and_then(|(sec, _)| time::OffsetDateTime::from_unix_timestamp(sec).ok());
    Some(ImageReport {
        name: image.name.clone(),
        digest: image.digest.clone(),
        tags: image.repo_tags.clone(),
        created: created.and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok()),
        architecture: image.architecture.clone(),
        os: image.os.clone(),
        variant: image.variant.clone(),
        author: image.author.clone(),
        user: image.user.clone(),
        working_dir: image.working_dir.clone(),
        entrypoint: image.entrypoint.clone(),
        cmd: image.cmd.clone(),
        env: image.env.clone(),
        exposed_ports: image.exposed_ports.clone(),
        volumes: image.volumes.clone(),
        stop_signal: image.stop_signal.clone(),
        labels: image.labels.clone(),
    })
}

/// Lines of `key  value`; what comes from the archive is escaped.
struct Text(String);

impl Text {
    fn line(&mut self, key: &str, value: impl AsRef<str>) {
        self.0 += &format!("{key:<11}{}\n", human::escaped(value.as_ref().as_bytes()));
    }
    fn some(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.line(key, value);
        }
    }
}

fn text(report: &Report) -> String {
    let mut out = Text(String::new());
    out.line("archive", format!("{}, {}", report.archive, human::bytes(report.archive_bytes)));
    out.line("version", format!("{} ({})", report.version, report.detected_from));
    out.line("digest", report.digest.to_string());
    out.line(
        "data",
        match &report.storage {
            StorageReport::Local => "in this file".to_owned(),
            StorageReport::S3 { bucket, key, region, endpoint, .. } => {
                let at = if endpoint.is_empty() { region } else { endpoint };
                format!("s3://{bucket}/{key}{}{at}", if at.is_empty() { "" } else { " at " })
            }
            StorageReport::Oci { layout: Some(dir), .. } => format!("OCI layout {dir} (this machine only)"),
            StorageReport::Oci { registry, repository, reference, .. } => {
                format!("{registry}/{repository}:{reference}")
            }
        },
    );
    out.line("root", if report.bundle { "/rootfs (OCI bundle)" } else { "/" });
    let tree = &report.tree;
    out.line(
        "tree",
        format!(
            "{} names: {} files, {} directories, {} symlinks, {} special; {} hard links",
            human::count(tree.names),
            human::count(tree.files),
            human::count(tree.directories),
            human::count(tree.symlinks),
            human::count(tree.special),
            human::count(tree.hard_links),
        ),
    );
    out.line(
        "content",
        format!(
            "{} in files; the tree takes {} of memory",
            human::bytes(tree.content_bytes),
            human::bytes(tree.memory_bytes)
        ),
    );
    out.line("integrity", report.integrity.says);
    if let Some(extension) = &report.extension {
        let table = extension.seek_table_bytes.map(|n| format!(", seek table {}", human::bytes(n))).unwrap_or_default();
        out.line("made by", format!("{}{table}", extension.generator));
        if let (Some(digest), Some(platform)) = (&extension.manifest_digest, &extension.platform) {
            out.line("manifest", format!("{digest} ({platform})"));
        }
    }
    if let Some(image) = &report.image {
        out.some("image", &image.name);
        out.some("created", image.created.as_deref().unwrap_or_default());
        out.some("entrypoint", &image.entrypoint.join(" "));
        out.some("cmd", &image.cmd.join(" "));
        out.some("user", &image.user);
        out.some("workdir", &image.working_dir);
    }
    if !report.layers.is_empty() {
        let size = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), human::bytes);
        out.0 += &format!("\n{:<22}{:>12}{:>14}{:>12}{:>8}\n", "layer", "compression", "stored", "unpacked", "spans");
        for layer in &report.layers {
            out.0 += &format!(
                "{:<22}{:>12}{:>14}{:>12}{:>8}\n",
                human::escaped(human::short_digest(&layer.digest).as_bytes()),
                layer.compression.as_deref().unwrap_or("-").to_owned()
                    + if layer.table_of_contents { " (toc)" } else { "" },
                size(layer.compressed_bytes),
                size(layer.uncompressed_bytes),
                human::count(layer.spans),
            );
        }
    }
    out.0
}
