//! From the location of an archive to a filesystem: fetch header, index and storage info, tell v1 from v2, wire the blobs.

use std::ops::Range;
use std::str::FromStr as _;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join;
use serde::Deserialize;
use tokio::sync::SemaphorePermit;

use super::legacy;
use super::parts::{CacheContext, LazySource, Part, Shape, Tables};
use super::{ImageFs, Integrity, RootView};
use crate::archive::{Archive, ArchiveError, HEADER_LEN, Header, Kind, NodeId, Storage, Tree, TreeBuilder, Version};
use crate::cache::{Cache, CacheError};
use crate::source::{BlobSource, Credentials, Location, SourceError, Sources};
use crate::units::Digest;

/// Parts of an archive that lie closer than this are fetched in one request: cheaper than another round trip.
const JOIN_GAP: u64 = 256 << 10;

/// Longest `config.json` of a bundle that is looked at.
const MAX_BUNDLE_CONFIG: u64 = 1 << 20;

/// Why an archive can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum OpenError {
    #[error("{what}: {source}")]
    Archive { what: String, source: ArchiveError },
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("{what}: {detail}")]
    Invalid { what: String, detail: String },
}

/// How to open.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct OpenOptions {
    pub root: RootView,
    pub integrity: Integrity,
    pub credentials: Credentials,
    /// Part of the cache key of blobs without digests.
    pub scope: String,
}

/// An opened archive.
#[derive(Debug)]
pub struct Opened {
    /// The filesystem.
    pub fs: Arc<ImageFs>,
    /// The decoded archive without its tree's data: version, storage, extension, digest.
    pub archive: Arc<Archive>,
    /// Says which bytes are shown. The archive's digest where that covers all of them, by the digests in it; else, for
    /// data that no span digest covers, SHA-256 of it and of the file's place and identity: two archives may agree in
    /// index and checksums and differ in their data.
    pub content: Digest,
    /// How the version was told: "storage info of type oci", for `inspect` and logs.
    pub detected_from: String,
    /// Whether `/rootfs` is shown.
    pub bundle: bool,
    /// The blobs, for `verify`.
    pub(super) parts: Vec<Arc<Part>>,
    /// The sources that were opened with the volume's credentials, to renew these.
    elsewhere: Vec<Arc<LazySource>>,
}

impl Opened {
    /// Where the data lies, if not in the archive itself: whoever is shown the archive must be let in there. The layers of
    /// an image lie in one repository, so the first stands for all.
    pub fn data_location(&self) -> Option<Location> {
        data_locations(&self.archive).ok()?.into_iter().next()
    }

    /// Fetches what is not in the archive itself with these credentials from now on: those of the opening may have been
    /// rotated since, or an earlier process had them.
    pub fn renew_credentials(&self, credentials: &Credentials) {
        self.elsewhere.iter().for_each(|source| source.renew(credentials));
    }

    /// Bytes of files that can be checked only as a whole (large files of a v1 archive without span digests): a partial
    /// read of them rests on the transport. 0 for archives that we made and for v2.
    pub fn whole_file_only_bytes(&self) -> u64 {
        if self.parts.iter().any(|part| matches!(part.shape, Shape::Legacy)) {
            legacy::whole_file_only_bytes(self.fs.tree())
        } else {
            0
        }
    }
}

/// Opens the archive behind `archive`; fetches header, index and storage info only (a few requests), never file data
/// (but for a legacy bundle's small `config.json`).
pub async fn open(
    archive: Arc<dyn BlobSource>,
    sources: &Sources,
    cache: &Arc<Cache>,
    options: &OpenOptions,
) -> Result<Opened, OpenError> {
    let what = archive.describe();
    let bad = |source| OpenError::Archive { what: what.clone(), source };
    let invalid = |detail: String| OpenError::Invalid { what: what.clone(), detail };
    let ([header, index, storage_info], room) = fetch(archive.as_ref()).await?;
    // Tens of milliseconds for a large index: not on the runtime's threads.
    let decoded = tokio::task::spawn_blocking(move || {
        let _room = room;
        let mut decoded = crate::archive::decode(&header, &index, &storage_info)?;
        let tree = std::mem::replace(&mut decoded.tree, TreeBuilder::default().finish()?);
        Ok((decoded, tree))
    });
    let (decoded, tree) = decoded.await.map_err(|e| invalid(e.to_string()))?.map_err(bad)?;
    let tree = Arc::new(tree);
    let (parts, elsewhere) = parts_of(&decoded, &archive, sources, options).map_err(invalid)?;
    let context = CacheContext { cache: Arc::clone(cache), integrity: options.integrity, scope: options.scope.clone() };
    let blobs: Vec<_> = parts.iter().map(|part| part.blob(&tree, &context)).collect();
    let whole = ImageFs::new(Arc::clone(&tree), NodeId::ROOT, blobs);

    let rootfs = tree.lookup(NodeId::ROOT, b"rootfs").filter(|id| tree.attr(*id).kind == Kind::Dir);
    let bundle = match (options.root, &decoded.extension) {
        (RootView::Archive, _) => false,
        (RootView::Bundle, _) => true,
        (RootView::Auto, Some(extension)) => extension.bundle,
        (RootView::Auto, None) => {
            decoded.version() == Version::V1 && rootfs.is_some() && is_bundle(&whole, &tree).await?
        }
    };
    let fs = match (bundle, rootfs) {
        (false, _) => whole,
        (true, Some(rootfs)) => whole.with_root(rootfs),
        (true, None) => {
            let detail = "it holds no directory /rootfs to show as the root; use root: archive to see all of it";
            return Err(invalid(detail.into()));
        }
    };
    let detected_from = match decoded.storage {
        Storage::Local => "no storage info: the data lies in the archive itself",
        Storage::S3(_) => "storage info of type s3",
        Storage::Oci(_) => "storage info of type oci",
    };
    let content = content(&decoded, &parts, archive.as_ref()).await?;
    Ok(Opened {
        fs: Arc::new(fs),
        archive: Arc::new(decoded),
        content,
        detected_from: detected_from.into(),
        bundle,
        parts,
        elsewhere,
    })
}

/// See [`Opened::content`]. Data elsewhere is named in the storage info, which the archive's digest covers.
async fn content(decoded: &Archive, parts: &[Arc<Part>], archive: &dyn BlobSource) -> Result<Digest, OpenError> {
    let bare = parts.iter().any(|part| matches!(part.shape, Shape::Legacy));
    if !bare || !matches!(decoded.storage, Storage::Local) {
        return Ok(decoded.digest);
    }
    let stat = archive.stat().await?;
    let identity = serde_json::json!([decoded.digest.hex(), archive.describe(), stat.size, stat.identity]);
    Ok(Digest::of(identity.to_string().as_bytes()))
}

/// Header, index and storage info in two requests (three where the latter two lie far apart). The header comes first, since
/// a source that answers it knows the size too.
/// Header, index and storage info, and the room that they take among all archives that are being opened.
async fn fetch(archive: &dyn BlobSource) -> Result<([Bytes; 3], Option<SemaphorePermit<'static>>), OpenError> {
    let bad = |source| OpenError::Archive { what: archive.describe(), source };
    let need = HEADER_LEN as u64;
    let first = match archive.read_range(0..need).await {
        Ok(first) => first,
        Err(error) => {
            // Shorter than a header says more than "no such range".
            let have = archive.stat().await.map_or(need, |stat| stat.size);
            let short = ArchiveError::Truncated { what: "header", need, have };
            return Err(if have < need { bad(short) } else { error.into() });
        }
    };
    let size = archive.stat().await?.size;
    let header = Header::decode(&first).map_err(bad)?;
    header.check(size).map_err(bad)?;
    let room = super::room::take(header.index.1.saturating_add(header.storage_info.1)).await;
    let range = |(pos, len): (u64, u64)| if len == 0 { 0..0 } else { pos..pos.saturating_add(len) };
    let (index, storage) = (range(header.index), range(header.storage_info));
    let near = index.end.max(storage.end) - index.start.min(storage.start)
        <= (index.end - index.start) + (storage.end - storage.start) + JOIN_GAP;
    let (index, storage) = if storage.is_empty() {
        (archive.read_range(index).await?, Bytes::new())
    } else if near {
        let start = index.start.min(storage.start);
        let all = archive.read_range(start..index.end.max(storage.end)).await?;
        let part = |range: Range<u64>| all.slice((range.start - start) as usize..(range.end - start) as usize);
        (part(index), part(storage))
    } else {
        try_join(archive.read_range(index), archive.read_range(storage)).await?
    };
    Ok(([first, index, storage], room))
}

/// Where the data lies that is not in the archive itself: the S3 object (v1), the layers in their order (v2).
fn data_locations(decoded: &Archive) -> Result<Vec<Location>, String> {
    match &decoded.storage {
        Storage::Local => Ok(Vec::new()),
        Storage::S3(s3) => Ok(vec![Location::S3 {
            endpoint: s3.endpoint.clone(),
            region: s3.region.clone(),
            bucket: s3.bucket.clone(),
            key: s3.key.clone(),
            path_style: s3.force_path_style,
        }]),
        Storage::Oci(oci) => {
            let layout = decoded.extension.as_ref().and_then(|extension| extension.layout.as_deref());
            let location = |layer: &String| {
                let digest = Digest::from_str(layer).map_err(|e| format!("a layer of its storage info: {e}"))?;
                Ok(match layout {
                    Some(dir) => Location::Layout { dir: dir.into(), digest },
                    None => Location::Registry {
                        registry: oci.registry_url.trim_end_matches('/').into(),
                        repository: oci.repository.clone(),
                        digest,
                    },
                })
            };
            oci.layers.iter().map(location).collect()
        }
    }
}

/// Blobs, and the sources of those that lie elsewhere.
type Parts = (Vec<Arc<Part>>, Vec<Arc<LazySource>>);

/// The blobs that the tree of an archive names, in its order, and the sources of those that lie elsewhere. Touches nothing.
fn parts_of(
    decoded: &Archive,
    archive: &Arc<dyn BlobSource>,
    sources: &Sources,
    options: &OpenOptions,
) -> Result<Parts, String> {
    let mut lazies = Vec::new();
    let mut lazy = |location| -> Arc<dyn BlobSource> {
        let source = Arc::new(LazySource::new(sources.clone(), location, options.credentials.clone()));
        lazies.push(Arc::clone(&source));
        source
    };
    let seek_table = decoded.extension.as_ref().and_then(|extension| extension.seek_table);
    let v1 = |source: Arc<dyn BlobSource>| {
        let tables = seek_table.map(|at| Arc::new(Tables::new(Arc::clone(&source), at)));
        let shape = if tables.is_some() { Shape::File } else { Shape::Legacy };
        vec![Arc::new(Part { shape, source, tables })]
    };
    let elsewhere = data_locations(decoded)?;
    let parts: Result<Vec<_>, String> = match &decoded.storage {
        Storage::Local => Ok(v1(Arc::clone(archive))),
        Storage::S3(_) => Ok(elsewhere.into_iter().flat_map(|location| v1(lazy(location))).collect()),
        Storage::Oci(oci) => {
            let tables = seek_table.map(|at| Arc::new(Tables::new(Arc::clone(archive), at)));
            let part = |(location, layer): (Location, &String)| {
                let (Location::Layout { digest, .. } | Location::Registry { digest, .. }) = location else {
                    return Err(format!("layer {layer} lies neither in a registry nor in a layout"));
                };
                let shape = Shape::Layer { digest };
                Ok(Arc::new(Part { shape, source: lazy(location), tables: tables.clone() }))
            };
            elsewhere.into_iter().zip(&oci.layers).map(part).collect()
        }
    };
    Ok((parts?, lazies))
}

/// The part of an OCI runtime specification that makes a directory a bundle.
#[derive(Deserialize)]
struct BundleConfig {
    #[serde(rename = "ociVersion")]
    _oci_version: String,
    root: BundleRoot,
}

#[derive(Deserialize)]
struct BundleRoot {
    path: String,
}

/// Whether `/config.json` is an OCI runtime specification whose root is `rootfs`. Reads that small file; if it can't be
/// read, which root to show can't be known.
async fn is_bundle(fs: &ImageFs, tree: &Tree) -> Result<bool, OpenError> {
    let Some(config) = tree.lookup(NodeId::ROOT, b"config.json") else { return Ok(false) };
    let attr = tree.attr(config);
    if attr.kind != Kind::File || attr.size == 0 || attr.size > MAX_BUNDLE_CONFIG {
        return Ok(false);
    }
    let bytes = fs.fetch(config, 0, attr.size as usize).await?;
    let rootfs = |config: BundleConfig| config.root.path.trim_start_matches("./").trim_end_matches('/') == "rootfs";
    Ok(serde_json::from_slice(&bytes).is_ok_and(rootfs))
}
