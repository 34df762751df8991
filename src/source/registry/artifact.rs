//! Archives as OCI artifacts: what the manifest says. No network here.
//!
//! An image manifest of OCI 1.1 with an `artifactType` of ours, the empty configuration, and one layer: the archive. Its
//! `subject`, where there is one, is the manifest of the image that the archive shows.

use std::collections::BTreeMap;
use std::time::SystemTime;

use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::super::SourceError;
use super::super::image::{digest_of, parse_json};
use crate::archive::Version;
use crate::units::{Digest, Platform};

/// The media type of an OCI manifest.
pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of an OCI index.
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The configuration that says nothing: `{}`, as the image specification has it.
pub(super) const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Its bytes.
pub(super) const EMPTY_BYTES: &[u8] = b"{}";
/// When it was made, RFC 3339 in UTC: a standard annotation.
const CREATED: &str = "org.opencontainers.image.created";
/// The file name that `oras pull` gives the archive: a standard annotation.
const TITLE: &str = "org.opencontainers.image.title";
/// Annotations of ours: see docs/archive-store.md.
const PREFIX: &str = "cloud.beam.clip";

/// `artifactType` of an archive.
pub fn artifact_type(version: Version) -> &'static str {
    match version {
        Version::V1 => "application/vnd.beam.clip.archive.v1",
        Version::V2 => "application/vnd.beam.clip.archive.v2",
    }
}

/// Media type of the layer that is the archive.
pub fn layer_type(version: Version) -> &'static str {
    match version {
        Version::V1 => "application/vnd.beam.clip.archive.layer.v1",
        Version::V2 => "application/vnd.beam.clip.archive.layer.v2",
    }
}

fn version_of(artifact_type: &str) -> Option<Version> {
    [Version::V1, Version::V2].into_iter().find(|version| self::artifact_type(*version) == artifact_type)
}

/// How an artifact is named within its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ArtifactRef {
    Tag(String),
    Digest(Digest),
}

impl std::fmt::Display for ArtifactRef {
    /// With what separates it from the repository: `:tag`, `@sha256:…`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => write!(f, ":{tag}"),
            Self::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

/// What a push says of an archive beside its bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels {
    /// The file name under which it is shown.
    pub title: String,
    /// The image's platform, where it was made of an image.
    pub platform: Option<Platform>,
    /// The image's manifest, where it was made of an image.
    pub image: Option<Digest>,
    /// Uncompressed bytes per span, where that is known.
    pub span: Option<u64>,
    /// When it was made, or last used; whole seconds count.
    pub created: Option<SystemTime>,
}

/// The manifest that an artifact is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

/// An archive in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Digest of the artifact's manifest.
    pub digest: Digest,
    /// v1 or v2, by the artifact's type.
    pub version: Version,
    /// The archive: a blob of the same repository.
    pub blob: Digest,
    /// The archive's length in bytes.
    pub size: u64,
    /// The image that it refers to.
    pub subject: Option<Digest>,
    /// All annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

impl Artifact {
    /// When it was made, or last used.
    pub fn created(&self) -> Option<SystemTime> {
        OffsetDateTime::parse(self.annotations.get(CREATED)?, &Rfc3339).ok().map(SystemTime::from)
    }

    /// Uncompressed bytes per span, as it says.
    pub fn span(&self) -> Option<u64> {
        self.annotations.get(&format!("{PREFIX}.span"))?.parse().ok()
    }

    /// The platform that it says it is for.
    pub fn platform(&self) -> Option<Platform> {
        self.annotations.get(&format!("{PREFIX}.platform"))?.parse().ok()
    }

    /// The file name that it was given. From outside: not safe as a path.
    pub fn title(&self) -> Option<&str> {
        self.annotations.get(TITLE).map(String::as_str)
    }

    /// Reads a manifest. `Ok(None)`: something else than an archive.
    pub(super) fn parse(what: &str, digest: Digest, bytes: &[u8]) -> Result<Option<Self>, SourceError> {
        /// Told apart first: an index, or a manifest of another kind, is no error.
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Kind {
            artifact_type: Option<String>,
        }
        let kind: Kind = parse_json(what, bytes)?;
        let Some(version) = kind.artifact_type.as_deref().and_then(version_of) else { return Ok(None) };
        let manifest: ImageManifest = parse_json(what, bytes)?;
        let wrong = |detail: &str| SourceError::Corrupt { what: what.into(), detail: detail.into() };
        let [layer] = manifest.layers().as_slice() else {
            return Err(wrong("an archive has exactly one layer; push it again"));
        };
        if layer.media_type().to_string() != layer_type(version) {
            return Err(wrong("its layer is not the archive that its artifactType announces; push it again"));
        }
        Ok(Some(Self {
            digest,
            version,
            blob: digest_of(what, layer)?,
            size: layer.size(),
            subject: manifest.subject().as_ref().map(|subject| digest_of(what, subject)).transpose()?,
            annotations: manifest.annotations().clone().unwrap_or_default().into_iter().collect(),
        }))
    }
}

fn annotations(version: Version, labels: &Labels) -> BTreeMap<String, String> {
    let number = match version {
        Version::V1 => "1",
        Version::V2 => "2",
    };
    let created = labels.created.and_then(|at| {
        let at = OffsetDateTime::from(at).replace_nanosecond(0).ok()?;
        at.format(&Rfc3339).ok()
    });
    [
        (format!("{PREFIX}.version"), Some(number.to_owned())),
        (format!("{PREFIX}.platform"), labels.platform.as_ref().map(ToString::to_string)),
        (format!("{PREFIX}.image"), labels.image.map(|digest| digest.to_string())),
        (format!("{PREFIX}.span"), labels.span.map(|span| span.to_string())),
        (format!("{PREFIX}.generator"), Some(concat!("clip-csi ", env!("CARGO_PKG_VERSION")).to_owned())),
        (TITLE.to_owned(), Some(labels.title.clone()).filter(|title| !title.is_empty())),
        (CREATED.to_owned(), created),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect()
}

/// The manifest of an archive: its bytes are the same for the same arguments.
pub(super) fn manifest(
    version: Version,
    blob: &Digest,
    size: u64,
    labels: &Labels,
    subject: Option<&Subject>,
) -> Vec<u8> {
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type(version),
        "config": {
            "mediaType": EMPTY,
            "digest": Digest::of(EMPTY_BYTES).to_string(),
            "size": EMPTY_BYTES.len(),
            "data": "e30=",
        },
        "layers": [{
            "mediaType": layer_type(version),
            "digest": blob.to_string(),
            "size": size,
            // `oras pull` names the file after the layer's title.
            "annotations": {TITLE: labels.title},
        }],
        "annotations": annotations(version, labels),
    });
    if let Some(Subject { digest, size, media_type }) = subject {
        manifest["subject"] = json!({"mediaType": media_type, "digest": digest.to_string(), "size": size});
    }
    manifest.to_string().into_bytes()
}

/// An entry of the index of referrers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referrer {
    /// The manifest that refers to the subject.
    pub digest: Digest,
    /// What the index says that it is. Registries differ: some give the configuration's media type, some nothing.
    pub artifact_type: Option<String>,
    /// When it was made, as the index says it: RFC 3339 sorts as text.
    pub created: Option<String>,
}

impl Referrer {
    /// Whether it may be an archive of this version: to be looked at. One that says something else is not.
    pub(super) fn may_be(&self, version: Version) -> bool {
        match self.artifact_type.as_deref() {
            None | Some("" | EMPTY) => true,
            Some(other) => other == artifact_type(version),
        }
    }

    pub(super) fn of(descriptor: &Descriptor) -> Option<Self> {
        Some(Self {
            digest: descriptor.digest().as_ref().parse().ok()?,
            artifact_type: descriptor.artifact_type().as_ref().map(ToString::to_string),
            created: descriptor.annotations().as_ref().and_then(|a| a.get(CREATED)).cloned(),
        })
    }
}

/// The tag that stands in for the referrers API: `sha256-<hex>` of the subject.
pub(super) fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// The index under the fallback tag with one more entry; `None`: it is there already. Entries that we don't understand
/// stay as they are.
pub(super) fn with_entry(
    what: &str,
    index: Option<&[u8]>,
    manifest: &[u8],
    version: Version,
) -> Result<Option<Vec<u8>>, SourceError> {
    let mut index: serde_json::Value = match index {
        Some(bytes) => parse_json(what, bytes)?,
        None => json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}),
    };
    let digest = Digest::of(manifest).to_string();
    let made: serde_json::Value = parse_json(what, manifest)?;
    let Some(entries) = index.get_mut("manifests").and_then(serde_json::Value::as_array_mut) else {
        let detail = "is no index, though its tag is that of one; delete the tag".into();
        return Err(SourceError::Invalid { what: what.into(), detail });
    };
    if entries.iter().any(|entry| entry["digest"] == digest) {
        return Ok(None);
    }
    entries.push(json!({
        "mediaType": MANIFEST,
        "digest": digest,
        "size": manifest.len(),
        "artifactType": artifact_type(version),
        "annotations": made["annotations"],
    }));
    Ok(Some(index.to_string().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn labels() -> Labels {
        Labels {
            title: "app.clip".into(),
            platform: Some("linux/arm64/v8".parse().unwrap()),
            image: Some(Digest::of(b"image")),
            span: Some(1 << 20),
            created: Some(UNIX_EPOCH + Duration::from_millis(1_700_000_000_900)),
        }
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_made() {
        let subject = Subject { digest: Digest::of(b"image"), size: 5, media_type: MANIFEST.into() };
        let blob = Digest::of(b"archive");
        let bytes = manifest(Version::V2, &blob, 7, &labels(), Some(&subject));
        let read = Artifact::parse("x", Digest::of(&bytes), &bytes).unwrap().unwrap();
        assert_eq!((read.version, read.blob, read.size, read.subject), (Version::V2, blob, 7, Some(subject.digest)));
        assert_eq!(read.created(), Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
        assert_eq!(read.platform(), labels().platform);
        assert_eq!(read.title(), Some("app.clip"));
        assert_eq!(bytes, manifest(Version::V2, &blob, 7, &labels(), Some(&subject)), "the same push, the same digest");
    }

    #[test]
    fn an_image_is_no_archive_and_a_wrong_archive_is_an_error() {
        let image = json!({"schemaVersion": 2, "config": {"mediaType": "a/b", "digest": Digest::of(b"").to_string(), "size": 0}, "layers": []});
        let parse = |value: &serde_json::Value| Artifact::parse("x", Digest::of(b""), value.to_string().as_bytes());
        assert_eq!(parse(&image).unwrap(), None);
        assert_eq!(parse(&json!({"schemaVersion": 2, "manifests": []})).unwrap(), None);
        let good: serde_json::Value =
            serde_json::from_slice(&manifest(Version::V1, &Digest::of(b"a"), 1, &labels(), None)).unwrap();
        assert!(parse(&good).unwrap().is_some());
        let mut two = good.clone();
        two["layers"] = json!([good["layers"][0], good["layers"][0]]);
        let mut other = good.clone();
        other["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
        assert!(parse(&two).is_err() && parse(&other).is_err() && parse(&json!([])).is_err());
    }

    #[test]
    fn the_fallback_index_grows_and_keeps_what_others_wrote() {
        let foreign = json!({"schemaVersion": 2, "manifests": [{"digest": "sha256:00", "x": 1}], "y": 2}).to_string();
        let bytes = manifest(Version::V2, &Digest::of(b"a"), 1, &labels(), None);
        let grown = with_entry("x", Some(foreign.as_bytes()), &bytes, Version::V2).unwrap().unwrap();
        let value: serde_json::Value = serde_json::from_slice(&grown).unwrap();
        assert_eq!((&value["manifests"][0]["x"], &value["y"]), (&json!(1), &json!(2)));
        assert_eq!(value["manifests"][1]["artifactType"], artifact_type(Version::V2));
        assert_eq!(with_entry("x", Some(&grown), &bytes, Version::V2).unwrap(), None);
        assert!(with_entry("x", Some(b"{}"), &bytes, Version::V2).is_err());
    }
}
