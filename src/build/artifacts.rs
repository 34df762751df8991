//! What indexing a layer found, kept on the machine that found it: the next image with that layer, and the next try after an
//! interruption, need not stream it again.
//!
//! An artifact holds the layer's entries and its table: seek points, span digests, diff ID. It is named by the SHA-256 of all that it
//! depends on ([`Artifacts::path`]), written beside and renamed, and opens with the digest of its own content: one that is damaged is
//! deleted and made again. It is *not* checked against the layer, which would take the layer: whoever can write the directory can
//! say what a layer holds. So it belongs to this user alone, as the archive directory of a node does, or is not used.
//!
//! A private layer's artifact serves the scope that it was found in and no other: a manifest of somebody else's that names the layer's
//! digest, which is no secret, must not get its names and digests. What was found in a public image serves all.

mod wire;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tracing::{debug, warn};

use crate::archive::BlobTable;
use crate::build::tar::TarEntry;
use crate::source::Scope;
use crate::units::Digest;

/// Changes with the meaning of what is kept; the program's own version counts besides.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"XClipLy\n";
const SUFFIX: &str = "layer";
/// Largest artifact that is read or kept, in bytes. That of a layer with 100,000 files has about 3 MB.
const MAX_ARTIFACT: u64 = 512 << 20;
/// As [`MAX_ARTIFACT`], unpacked.
const MAX_UNPACKED: u64 = 2 << 30;
/// Age from which on a temporary file is one that a killed process left.
const STALE: Duration = Duration::from_secs(24 * 3600);
/// zstd level of artifacts: written once a layer, so speed counts.
const LEVEL: i32 = 1;

/// What is kept of one layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Artifact {
    pub(super) entries: Vec<TarEntry>,
    pub(super) table: BlobTable,
}

/// A directory of artifacts.
#[derive(Debug)]
pub struct Artifacts {
    dir: PathBuf,
    max_bytes: u64,
    /// By file: held while a layer is being indexed.
    busy: Mutex<HashMap<PathBuf, Weak<tokio::sync::Mutex<()>>>>,
}

impl Artifacts {
    /// Artifacts in `dir`, made with mode 0700 when the first one is kept; those longest unused go when they take more than
    /// `max_bytes`. A directory that cannot be used costs time, never a build.
    pub fn new(dir: PathBuf, max_bytes: u64) -> Self {
        Self { dir, max_bytes, busy: Mutex::default() }
    }

    /// Where the artifact of a layer lies.
    pub(super) fn path(&self, layer: &Digest, span_size: u64, scope: &Scope) -> PathBuf {
        let scope = match scope {
            Scope::Public => None,
            Scope::Private(scope) => Some(scope.to_string()),
        };
        let key = serde_json::json!([VERSION, env!("CARGO_PKG_VERSION"), layer.to_string(), span_size, scope]);
        self.dir.join(format!("{}.{SUFFIX}", Digest::of(key.to_string().as_bytes()).hex()))
    }

    /// Whoever holds it indexes the layer; the others wait and find the artifact then.
    pub(super) fn turn(&self, path: &Path) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = busy.get(path).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        busy.insert(path.to_owned(), Arc::downgrade(&turn));
        turn
    }

    /// The artifact of a layer, if there is one that is whole. Blocks.
    pub(super) fn load(&self, path: &Path, layer: &Digest) -> Option<Artifact> {
        let mut file = File::open(path).ok()?;
        if let Err(detail) = self.usable() {
            warn!(dir = %self.dir.display(), detail, "artifacts of layers are not used");
            return None;
        }
        match read(&mut file, layer) {
            Ok(artifact) => {
                // Its age is the time since it was last of use.
                let _ = file.set_modified(SystemTime::now());
                debug!(%layer, "indexed before: its artifact is used");
                Some(artifact)
            }
            Err(detail) => {
                warn!(artifact = %path.display(), detail, "an artifact of a layer is damaged: indexing the layer again");
                let _ = fs::remove_file(path);
                None
            }
        }
    }

    /// Keeps an artifact, and makes room for it. Blocks.
    pub(super) fn keep(&self, path: &Path, artifact: &Artifact) {
        if let Err(detail) = self.try_keep(path, artifact) {
            warn!(dir = %self.dir.display(), detail, "the artifact of a layer can't be kept");
        }
    }

    fn try_keep(&self, path: &Path, artifact: &Artifact) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(text)?;
        self.usable()?;
        let mut body = zstd::stream::write::Encoder::new(Vec::new(), LEVEL).map_err(text)?;
        wire::write(artifact, &mut body).map_err(text)?;
        let body = body.finish().map_err(text)?;
        if body.len() as u64 > MAX_ARTIFACT.min(self.max_bytes) {
            return Err(format!("it takes {} bytes", body.len()));
        }
        // Not synced: what a crash damages is found out and made again.
        let mut file =
            tempfile::Builder::new().prefix(".layer-").suffix(".tmp").tempfile_in(&self.dir).map_err(text)?;
        file.write_all(MAGIC).map_err(text)?;
        file.write_all(&Digest::of(&body).0).map_err(text)?;
        file.write_all(&body).map_err(text)?;
        file.persist(path).map_err(|error| error.to_string())?;
        self.clean_up(path);
        Ok(())
    }

    /// The directory is this user's, and nobody else can write to it.
    fn usable(&self) -> Result<(), String> {
        let meta = fs::symlink_metadata(&self.dir).map_err(|error| error.to_string())?;
        let own = rustix::process::geteuid().as_raw();
        if !meta.is_dir() || meta.uid() != own || meta.mode() & 0o022 != 0 {
            return Err(format!("it must be a directory of user {own} that no other can write to: chmod 700"));
        }
        Ok(())
    }

    /// Deletes artifacts, the longest unused first, until they take no more than they may.
    fn clean_up(&self, keep: &Path) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let now = SystemTime::now();
        let mut files = Vec::new();
        for entry in entries.flatten() {
            let (path, Ok(meta)) = (entry.path(), entry.metadata()) else { continue };
            let Ok(used) = meta.modified() else { continue };
            match path.extension().and_then(|extension| extension.to_str()) {
                Some(SUFFIX) => files.push((used, meta.len(), path)),
                Some("tmp") if now.duration_since(used).is_ok_and(|age| age > STALE) => drop(fs::remove_file(path)),
                _ => {}
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total <= self.max_bytes {
                return;
            }
            if path != keep && fs::remove_file(&path).is_ok() {
                total -= len;
            }
        }
    }
}

fn read(file: &mut File, layer: &Digest) -> Result<Artifact, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut bytes = Vec::new();
    file.take(MAX_ARTIFACT + 64).read_to_end(&mut bytes).map_err(text)?;
    let (digest, body) = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.split_at_checked(32))
        .ok_or("it does not start as artifacts do")?;
    if Digest::of(body).0 != *digest {
        return Err("its content is not what its digest says".into());
    }
    let mut plain = Vec::new();
    let unpacked = zstd::stream::read::Decoder::new(body).map_err(text)?;
    unpacked.take(MAX_UNPACKED).read_to_end(&mut plain).map_err(text)?;
    let artifact = wire::decode(plain)?;
    if artifact.table.digest != *layer {
        return Err(format!("it is of layer {}", artifact.table.digest));
    }
    Ok(artifact)
}

#[cfg(test)]
mod tests;
