//! The demo without the kernel: the same reads, through the library.

use std::path::Path;
use std::time::Instant;

use sha2::{Digest as _, Sha256};

use super::image::DemoImage;
use super::model::{Inodes, Model, Record, What, join};
use super::{Archive, DIFFERENCES, Seen};
use crate::archive::{Kind, NodeId};
use crate::cache::{Cache, CacheConfig};
use crate::cli::CliError;
use crate::fs::{ImageFs, OpenOptions, open};
use crate::metrics::metrics;
use crate::source::{Credentials, Location, Policy, Sources};

/// Bytes per read.
const CHUNK: usize = 1 << 20;

/// Opens the archive and reads everything in it.
pub(super) async fn read(root: &Path, archive: &Archive, image: &DemoImage) -> Result<Seen, CliError> {
    let before = fetched();
    let since = Instant::now();
    let sources = Sources::new(Policy { trusted: true, config: Default::default() })?;
    let source = sources.open(&Location::File(archive.path.clone()), &Credentials::default()).await?;
    let cache = Cache::open(&CacheConfig { dir: root.join(format!("cache-{}", archive.name)), ..Default::default() })?;
    let options = OpenOptions { scope: "public".into(), ..Default::default() };
    let opened = open(source, &sources, &cache, &options).await?;
    let publish = since.elapsed();
    let fs = &opened.fs;

    let shown = String::from_utf8_lossy(&image.probe).into_owned();
    let since = Instant::now();
    let probe =
        fs.tree().resolve(fs.root(), &image.probe, false).map_err(|e| CliError::NotFound(format!("{shown}: {e}")))?;
    fs.fetch(probe, 0, 1).await?;
    let first_byte = since.elapsed();
    hash(fs, probe, &shown).await?;
    let fetched_probe = fetched() - before;
    let since = Instant::now();
    let seen = model(fs).await?;
    Ok(Seen {
        detected_from: opened.detected_from.clone(),
        publish,
        first_byte,
        fetched_probe,
        fetched_all: fetched() - before,
        read_all: since.elapsed(),
        tree: seen.digest(),
        differences: image.model.differences(&seen, DIFFERENCES),
        stats: None,
    })
}

/// What this process fetched so far.
fn fetched() -> u64 {
    let sources = ["file", "s3", "registry"];
    sources.into_iter().map(|source| metrics().range_get_bytes.with_label_values(&[source]).get()).sum()
}

async fn model(fs: &ImageFs) -> Result<Model, CliError> {
    let tree = fs.tree();
    let mut model = Model::default();
    let mut inodes = Inodes::default();
    let mut open = vec![(fs.root(), Vec::new())];
    while let Some((node, name)) = open.pop() {
        let attr = tree.attr(node);
        let what = match attr.kind {
            Kind::Dir => {
                open.extend(tree.children(node).map(NodeId).map(|child| (child, join(&name, tree.name(child)))));
                What::Dir
            }
            Kind::Symlink => What::Symlink { target: tree.target(node).to_vec() },
            Kind::File => {
                inodes.note(u64::from(tree.inode(node).0), &name);
                let sha256 = hash(fs, node, &String::from_utf8_lossy(&name)).await?;
                What::File { size: attr.size, sha256, first: name.clone(), names: attr.nlink.into() }
            }
            Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => What::Special,
        };
        let mtime = (attr.mtime.sec, attr.mtime.nsec);
        model.names.insert(name, Record { what, mode: attr.mode.into(), uid: attr.uid, gid: attr.gid, mtime });
    }
    inodes.first_names(&mut model);
    Ok(model)
}

async fn hash(fs: &ImageFs, node: NodeId, name: &str) -> Result<[u8; 32], CliError> {
    let size = fs.tree().attr(node).size;
    let mut sha = Sha256::new();
    let mut off = 0;
    while off < size {
        let bytes = fs.fetch(node, off, CHUNK).await?;
        if bytes.is_empty() {
            return Err(CliError::Corrupt(format!("{name} ends at byte {off}, its size is {size}")));
        }
        sha.update(&bytes);
        off += bytes.len() as u64;
    }
    Ok(sha.finalize().into())
}
