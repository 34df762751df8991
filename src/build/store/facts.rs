//! What an archive file says of itself: what pushing it, and trusting one that was found, needs to know.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::archive::{self, Archive, ArchiveError, HEADER_LEN, Header, SeekTable, Storage, Version};
use crate::build::BuildError;
use crate::build::output::blocking;
use crate::source::ResolvedImage;
use crate::units::{Digest, Platform};

/// Index, storage info and seek table together: as much as is held in memory of one archive.
const MAX_METADATA: u64 = 1 << 30;

/// An archive file, opened as far as its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// v1 or v2.
    pub version: Version,
    /// The image's manifest, where the archive names it.
    pub manifest: Option<Digest>,
    /// Its platform.
    pub platform: Option<Platform>,
    /// It has a table of ours: every byte that is read through it is checked.
    pub verified: bool,
    /// Uncompressed bytes per span, where that table has a blob of several.
    pub span: Option<u64>,
    /// Host, repository and layers of a v2 archive whose layers lie in a registry.
    pub layers: Option<(String, String, Vec<String>)>,
    /// The data lies in the archive itself.
    pub local: bool,
}

impl Facts {
    /// Reads header, index, storage info and seek table of a local file, with their checks.
    pub async fn of(file: &Path) -> Result<Self, BuildError> {
        let path = file.to_owned();
        blocking(move || {
            let what = path.display().to_string();
            let io = |e: std::io::Error| BuildError::io(&what, &e);
            let file = std::fs::File::open(&path).map_err(io)?;
            let size = file.metadata().map_err(io)?.len();
            let read = |(at, len): (u64, u64), what: &'static str| -> Result<Vec<u8>, BuildError> {
                if len > MAX_METADATA {
                    return Err(ArchiveError::TooLarge { what, value: len, limit: MAX_METADATA }.into());
                }
                if at.checked_add(len).is_none_or(|end| end > size) {
                    return Err(ArchiveError::Truncated { what, need: at.saturating_add(len), have: size }.into());
                }
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, at).map_err(io)?;
                Ok(bytes)
            };
            let first = read((0, HEADER_LEN as u64), "header")?;
            let header = Header::decode(&first)?;
            header.check(size)?;
            let archive =
                archive::decode(&first, &read(header.index, "index")?, &read(header.storage_info, "storage info")?)?;
            let table = match archive.extension.as_ref().and_then(|extension| extension.seek_table) {
                // The table of an archive in S3 lies there.
                Some((at, len, digest)) if !matches!(archive.storage, Storage::S3(_)) => {
                    let bytes = read((at, len), "seek table")?;
                    if Digest::of(&bytes) != digest {
                        let detail = "its seek table is not what its index says; make it again".into();
                        return Err(crate::source::SourceError::Corrupt { what, detail }.into());
                    }
                    Some(SeekTable::decode(&bytes)?)
                }
                _ => None,
            };
            Ok(Self::from(&archive, table.as_ref()))
        })
        .await
    }

    fn from(archive: &Archive, table: Option<&SeekTable>) -> Self {
        let extension = archive.extension.clone().unwrap_or_default();
        let spans = table.iter().flat_map(|table| &table.blobs).filter(|blob| blob.spans.len() > 1);
        Self {
            version: archive.version(),
            manifest: extension.manifest_digest,
            platform: extension.platform,
            verified: table.is_some(),
            span: spans.filter_map(|blob| blob.spans.get(1)).map(|span| span.uoff).max(),
            layers: match &archive.storage {
                Storage::Oci(oci) if extension.layout.is_none() => {
                    let host = oci.registry_url.trim_end_matches('/').to_owned();
                    Some((host, oci.repository.clone(), oci.layers.clone()))
                }
                _ => None,
            },
            local: archive.storage == Storage::Local,
        }
    }

    /// Why this is no index of that image, as it lies in that repository; `None`: it is one. The layers must be exactly the
    /// manifest's: what is read through it then has their digests behind it.
    pub fn objection(&self, image: &ResolvedImage, registry: &str, repository: &str) -> Option<String> {
        if self.version != Version::V2 {
            return Some("it carries its data, which nothing in the image vouches for".into());
        }
        if !self.verified {
            return Some("it has no digests of what it shows".into());
        }
        if self.manifest != Some(image.manifest_digest) {
            return Some("it was made of another manifest".into());
        }
        let Some((host, place, layers)) = &self.layers else {
            return Some("it does not say in which registry its layers lie".into());
        };
        let bare = |host: &str| host.trim_start_matches("https://").trim_start_matches("http://").to_ascii_lowercase();
        if bare(host) != bare(registry) || place != repository {
            return Some("its layers lie in another repository".into());
        }
        if !layers.iter().eq(image.layers.iter().map(|layer| layer.digest.to_string()).collect::<Vec<_>>().iter()) {
            return Some("its layers are not the image's".into());
        }
        None
    }
}
