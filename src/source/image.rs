//! Image references, and what they resolve to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use super::{BlobSource, SourceError};
use crate::units::{Digest, Platform};

/// Largest manifest or index that is read, in bytes (registries themselves accept 4 MiB).
pub(super) const MANIFEST_LIMIT: u64 = 4 << 20;
/// Largest image configuration that is read, in bytes.
pub(super) const CONFIG_LIMIT: u64 = 8 << 20;
/// Most layers that an image may have (overlayfs, and so every runtime, stops at 500).
const MAX_LAYERS: usize = 512;
/// Most entries of an index.
const MAX_MANIFESTS: usize = 4096;
/// How deep indexes may lie in indexes.
const MAX_DEPTH: usize = 4;
/// Media types of an image's configuration.
const IMAGE_CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// The name under which Docker Hub is known to the Go module, and in archives.
pub(super) const DOCKER_HUB: &str = "index.docker.io";

/// What a user writes for an image.
///
/// In `oci:DIR:TAG` and `oci-archive:FILE:TAG` the tag is what follows the last colon, if it holds no slash. So a path whose
/// *last* component holds a colon is written with a colon at its end: `oci:/images/a:b:` is the directory `/images/a:b`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ImageRef {
    /// `registry/repo:tag`, `registry/repo@sha256:…`; Docker Hub's short names are completed (`index.docker.io`, `library/…`).
    Registry { registry: String, repository: String, tag: Option<String>, digest: Option<Digest> },
    /// `oci:DIR[:TAG]`.
    Layout { dir: PathBuf, tag: Option<String> },
    /// `oci-archive:FILE[:TAG]`: an uncompressed tar of a layout.
    LayoutArchive { file: PathBuf, tag: Option<String> },
}

impl std::str::FromStr for ImageRef {
    type Err = SourceError;
    fn from_str(text: &str) -> Result<Self, SourceError> {
        let invalid = |detail: String| SourceError::Invalid {
            what: format!("image reference {:?}", text.chars().take(200).collect::<String>()),
            detail,
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split_path(rest).ok_or_else(|| invalid("write oci:DIR or oci:DIR:TAG".into()))?;
            return Ok(Self::Layout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) =
                split_path(rest).ok_or_else(|| invalid("write oci-archive:FILE or oci-archive:FILE:TAG".into()))?;
            return Ok(Self::LayoutArchive { file, tag });
        }
        let forms =
            "write registry/repository:tag, registry/repository@sha256:…, oci:DIR[:TAG] or oci-archive:FILE[:TAG]";
        let foreign = ["docker-archive:", "docker-daemon:", "containers-storage:"];
        if text.contains("://") || foreign.iter().any(|f| text.starts_with(f)) {
            return Err(invalid(format!("this form is not known; {forms}")));
        }
        // The parser knows no IPv6 host: a stand-in takes its place.
        let (host, standing_in) = match text.strip_prefix('[').and_then(|t| t.split_once('/')) {
            Some((host, rest)) => (Some(format!("[{host}")), format!("ipv6.invalid/{rest}")),
            None => (None, text.to_owned()),
        };
        let parsed: oci_spec::distribution::Reference =
            standing_in.parse().map_err(|e| invalid(format!("{e}; {forms}")))?;
        if !is_repository(parsed.repository()) {
            return Err(invalid(format!("repository names are lower-case; {forms}")));
        }
        let digest = parsed.digest().map(str::parse).transpose().map_err(|e| invalid(format!("{e}; {forms}")))?;
        let registry = match host {
            Some(host) if url::Url::parse(&format!("http://{host}")).is_ok() => host,
            Some(_) => return Err(invalid(format!("the host is not an address; {forms}"))),
            None => parsed.resolve_registry().to_ascii_lowercase(),
        };
        let tag = parsed.tag().map(str::to_owned);
        Ok(Self::Registry { registry, repository: parsed.repository().to_owned(), tag, digest })
    }
}

/// Whether text from outside can stand in a registry's URL as a repository: lower-case words between slashes, no dot segments.
pub(super) fn is_repository(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let word = |w: &str| !w.is_empty() && w.bytes().all(allowed) && w.starts_with(|c: char| c.is_ascii_alphanumeric());
    text.len() <= 255 && text.split('/').all(word)
}

/// Splits `PATH[:TAG]` by the rule of [`ImageRef`].
fn split_path(text: &str) -> Option<(PathBuf, Option<String>)> {
    let (path, tag) = match text.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag).filter(|t| !t.is_empty())),
        _ => (text, None),
    };
    (!path.is_empty()).then(|| (PathBuf::from(path), tag.map(str::to_owned)))
}

impl std::fmt::Display for ImageRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (form, path, tag) = match self {
            Self::Registry { registry, repository, tag, digest } => {
                write!(f, "{registry}/{repository}")?;
                tag.iter().try_for_each(|t| write!(f, ":{t}"))?;
                return digest.iter().try_for_each(|d| write!(f, "@{d}"));
            }
            Self::Layout { dir, tag } => ("oci", dir, tag),
            Self::LayoutArchive { file, tag } => ("oci-archive", file, tag),
        };
        write!(f, "{form}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None if path.to_string_lossy().rsplit('/').next().is_some_and(|last| last.contains(':')) => {
                f.write_str(":")
            }
            None => Ok(()),
        }
    }
}

/// Who may share what was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// An anonymous pull of this manifest succeeded (or the image is a local one at the shell).
    Public,
    /// SHA-256 of (registry host, repository, identity).
    Private(Digest),
}

impl Scope {
    /// The private scope of one repository (or bucket) and one identity.
    pub fn private(host: &str, repository: &str, identity: &Digest) -> Self {
        let text = serde_json::json!([host, repository, identity.to_string()]);
        Self::Private(Digest::of(text.to_string().as_bytes()))
    }
}

/// One manifest with everything that a build needs.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// As the user wrote it.
    pub reference: ImageRef,
    /// Digest of the (platform's) manifest, checked.
    pub manifest_digest: Digest,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// The config's digest and bytes, checked (at most 8 MiB).
    pub config_digest: Digest,
    /// The config's bytes.
    pub config: Bytes,
    /// The platform that was chosen. An image that is not an index is taken whatever its platform is.
    pub platform: Platform,
    /// The layers, lowest first.
    pub layers: Vec<LayerSource>,
    /// Who may share it.
    pub scope: Scope,
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub struct LayerSource {
    /// Its descriptor's media type.
    pub media_type: String,
    /// Its descriptor's digest.
    pub digest: Digest,
    /// Its descriptor's size in bytes.
    pub size: u64,
    /// Its descriptor's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its bytes, as stored (compressed). Not checked against the digest: the reader of the whole does that.
    pub source: Arc<dyn BlobSource>,
}

/// Where manifests, configurations and layers are had: a layout or a repository.
#[async_trait]
pub(super) trait ImagePlace: Send + Sync {
    /// For messages.
    fn name(&self) -> String;
    /// A manifest or index by digest, checked, at most [`MANIFEST_LIMIT`].
    async fn manifest(&self, digest: &Digest) -> Result<Bytes, SourceError>;
    /// A configuration by digest, checked, at most [`CONFIG_LIMIT`].
    async fn config(&self, digest: &Digest, size: u64) -> Result<Bytes, SourceError>;
    /// A layer's bytes.
    async fn layer(&self, digest: &Digest, size: u64) -> Result<Arc<dyn BlobSource>, SourceError>;
}

/// Walks from the bytes of a manifest or index to one image. `top` must be checked already.
pub(super) async fn resolve(
    place: &dyn ImagePlace,
    reference: &ImageRef,
    top: Bytes,
    platform: &Platform,
    scope: Scope,
) -> Result<ResolvedImage, SourceError> {
    let what = place.name();
    let mut bytes = top;
    let mut said: Option<Platform> = None;
    for _ in 0..=MAX_DEPTH {
        match Document::parse(&what, &bytes)? {
            Document::Index(index) => {
                let entry = choose(&what, index.manifests().iter().filter(|d| !is_attestation(d)), platform)?;
                said = entry.platform().as_ref().map(platform_of).or(said);
                bytes = place.manifest(&digest_of(&what, entry)?).await?;
            }
            Document::Manifest(manifest) => {
                return finish(place, reference, bytes, &manifest, said.as_ref().unwrap_or(platform), scope).await;
            }
        }
    }
    Err(SourceError::Invalid { what, detail: format!("its indexes are nested more than {MAX_DEPTH} deep") })
}

async fn finish(
    place: &dyn ImagePlace,
    reference: &ImageRef,
    bytes: Bytes,
    manifest: &ImageManifest,
    platform: &Platform,
    scope: Scope,
) -> Result<ResolvedImage, SourceError> {
    let what = place.name();
    let invalid = |detail: String| SourceError::Invalid { what: what.clone(), detail };
    if manifest.layers().len() > MAX_LAYERS {
        return Err(invalid(format!("has {} layers, the limit is {MAX_LAYERS}", manifest.layers().len())));
    }
    let config_digest = digest_of(&what, manifest.config())?;
    let config_size = manifest.config().size();
    if config_size > CONFIG_LIMIT {
        return Err(invalid(format!("its configuration has {config_size} bytes, the limit is {CONFIG_LIMIT}")));
    }
    let config = place.config(&config_digest, config_size).await?;
    /// The part of an image configuration that names its platform.
    #[derive(serde::Deserialize)]
    struct Named {
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        variant: String,
        #[serde(default)]
        rootfs: Option<serde::de::IgnoredAny>,
    }
    let named: Named = serde_json::from_slice(&config).map_err(|e| {
        let kind = manifest.config().media_type();
        invalid(format!("its configuration ({kind}) is not an image's: {e}; is it another kind of artifact?"))
    })?;
    // Images with a configuration of an odd type are about; what has neither the type nor the content of one is something else.
    let kind = manifest.config().media_type().to_string();
    if !IMAGE_CONFIGS.contains(&&*kind) && named.rootfs.is_none() {
        let artifact = manifest.artifact_type().as_ref().map_or(kind, ToString::to_string);
        let artifact: String = artifact.chars().take(200).collect();
        return Err(invalid(format!("is an artifact of the type {artifact:?}, not a container image; name an image")));
    }
    let filled = |value: String, other: &str| if value.is_empty() { other.to_owned() } else { value };
    let variant = Some(named.variant).filter(|v| !v.is_empty());
    let stated = Platform {
        variant: variant.or_else(|| platform.variant.clone().filter(|_| named.architecture == platform.arch)),
        os: filled(named.os, &platform.os),
        arch: filled(named.architecture, &platform.arch),
    };
    // Anything may stand there. What can't be written as os/arch/variant says no more than that the image was wanted for this one.
    let readable = stated.to_string().parse().ok().filter(|read| *read == stated);
    let platform = readable.unwrap_or_else(|| platform.clone());
    let mut layers = Vec::with_capacity(manifest.layers().len());
    for descriptor in manifest.layers() {
        let (digest, size) = (digest_of(&what, descriptor)?, descriptor.size());
        layers.push(LayerSource {
            media_type: descriptor.media_type().to_string(),
            digest,
            size,
            annotations: descriptor.annotations().clone().unwrap_or_default().into_iter().collect(),
            source: place.layer(&digest, size).await?,
        });
    }
    Ok(ResolvedImage {
        reference: reference.clone(),
        manifest_digest: Digest::of(&bytes),
        manifest: bytes,
        config_digest,
        config,
        platform,
        layers,
        scope,
    })
}

/// A manifest or an index; told apart by what they hold, as media types are often missing.
enum Document {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

impl Document {
    fn parse(what: &str, bytes: &[u8]) -> Result<Self, SourceError> {
        let invalid = |detail: &str| Err(SourceError::Invalid { what: what.into(), detail: detail.into() });
        /// Only whether the parts are there.
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Parts {
            manifests: Option<serde::de::IgnoredAny>,
            config: Option<serde::de::IgnoredAny>,
            fs_layers: Option<serde::de::IgnoredAny>,
        }
        let parts: Parts = parse_json(what, bytes)?;
        match (parts.manifests, parts.config) {
            (Some(_), None) => {
                let index: ImageIndex = parse_json(what, bytes)?;
                if index.manifests().len() > MAX_MANIFESTS {
                    return invalid("its index has too many entries");
                }
                Ok(Self::Index(Box::new(index)))
            }
            (None, Some(_)) => Ok(Self::Manifest(Box::new(parse_json(what, bytes)?))),
            (Some(_), Some(_)) => invalid("its manifest is an index and an image at once; push it again"),
            (None, None) if parts.fs_layers.is_some() => {
                invalid("its manifest has Docker's schema 1, which is obsolete; push it again with a current tool")
            }
            (None, None) => invalid("its manifest has neither layers nor manifests: not an image"),
        }
    }
}

/// JSON from outside, as what it should be.
pub(super) fn parse_json<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, SourceError> {
    serde_json::from_slice(bytes).map_err(|e| SourceError::Invalid {
        what: what.into(),
        detail: format!("is not valid: {e}; push or export it again"),
    })
}

/// The digest of a descriptor; only SHA-256 is supported.
pub(super) fn digest_of(what: &str, descriptor: &Descriptor) -> Result<Digest, SourceError> {
    descriptor
        .digest()
        .as_ref()
        .parse()
        .map_err(|e: crate::units::ParseError| SourceError::Invalid { what: what.into(), detail: e.to_string() })
}

/// Bytes are what their digest says, or an error.
pub(super) fn check_digest(place: &str, kind: &str, wanted: &Digest, bytes: &[u8]) -> Result<(), SourceError> {
    let found = Digest::of(bytes);
    if found == *wanted {
        return Ok(());
    }
    let detail = format!("the {kind} {wanted} has the digest {found}; push or export the image again");
    Err(SourceError::Corrupt { what: place.into(), detail })
}

fn platform_of(p: &oci_spec::image::Platform) -> Platform {
    Platform { os: p.os().to_string(), arch: p.architecture().to_string(), variant: p.variant().clone() }
}

/// Not an image but a statement about one (provenance, SBOM), as BuildKit adds them.
pub(super) fn is_attestation(descriptor: &Descriptor) -> bool {
    let annotated = descriptor.annotations().as_ref().is_some_and(|a| a.contains_key("vnd.docker.reference.type"));
    annotated
        || descriptor.platform().as_ref().map(platform_of).is_some_and(|p| p.os == "unknown" && p.arch == "unknown")
}

/// The variant that an architecture has where none is named.
fn default_variant(arch: &str) -> Option<&'static str> {
    match arch {
        "arm64" => Some("v8"),
        "arm" => Some("v7"),
        "amd64" => Some("v1"),
        _ => None,
    }
}

/// How far the variant `has` lies below the variant `wanted`, on which it runs all the same; `None`: it does not.
fn steps_below(wanted: &str, has: &str) -> Option<u8> {
    let number = |variant: &str| variant.strip_prefix('v')?.parse::<u8>().ok();
    number(wanted)?.checked_sub(number(has)?)
}

/// The entry for a platform. Where the wish names no variant: the architecture's usual one, then one without, then the first. Where it
/// names one: that, else the nearest below, no variant counting as the usual one.
pub(super) fn choose<'a>(
    what: &str,
    entries: impl IntoIterator<Item = &'a Descriptor>,
    wanted: &Platform,
) -> Result<&'a Descriptor, SourceError> {
    let entries: Vec<&Descriptor> = entries.into_iter().collect();
    if let [one] = entries[..]
        && one.platform().is_none()
    {
        return Ok(one);
    }
    let usual = default_variant(&wanted.arch);
    let rank = |descriptor: &Descriptor| -> Option<u8> {
        let p = platform_of(descriptor.platform().as_ref()?);
        if p.os != wanted.os || p.arch != wanted.arch {
            return None;
        }
        match (wanted.variant.as_deref(), p.variant.as_deref()) {
            (Some(w), Some(v)) if w == v => Some(0),
            (Some(w), Some(v)) => steps_below(w, v).map(|steps| steps.saturating_mul(2)),
            // Behind an entry that names that variant.
            (Some(w), None) => {
                usual.and_then(|v| steps_below(w, v)).map(|steps| steps.saturating_mul(2).saturating_add(1))
            }
            (None, v) if v.is_some() && v == usual => Some(0),
            (None, None) => Some(1),
            (None, Some(_)) => Some(2),
        }
    };
    let best = entries.iter().filter_map(|d| Some((rank(d)?, *d))).min_by_key(|(rank, _)| *rank);
    best.map(|(_, descriptor)| descriptor).ok_or_else(|| {
        let mut has: Vec<String> =
            entries.iter().filter_map(|d| d.platform().as_ref()).map(|p| platform_of(p).to_string()).collect();
        has.sort();
        has.dedup();
        let has =
            if has.is_empty() { "it names no platforms".to_owned() } else { format!("it has {}", has.join(", ")) };
        SourceError::NotFound {
            what: what.into(),
            detail: format!("no image for {wanted}; {has}; choose with `platform`"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ImageRef {
        text.parse().unwrap()
    }

    #[test]
    fn short_names_are_completed_as_docker_does() {
        for (text, full) in [
            ("python", "index.docker.io/library/python:latest"),
            ("python:3.12", "index.docker.io/library/python:3.12"),
            ("bitnami/redis", "index.docker.io/bitnami/redis:latest"),
            ("docker.io/python:3.12", "index.docker.io/library/python:3.12"),
            ("index.docker.io/library/python:3.12", "index.docker.io/library/python:3.12"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
            ("[::1]:5000/a/b:c", "[::1]:5000/a/b:c"),
        ] {
            assert_eq!(parse(text).to_string(), full);
            assert_eq!(parse(full), parse(text), "{text}");
        }
    }

    #[test]
    fn a_digest_may_stand_beside_a_tag() {
        let digest = Digest::of(b"x");
        let with_tag = parse(&format!("ghcr.io/a/b:t@{digest}"));
        let ImageRef::Registry { tag, digest: found, .. } = &with_tag else { panic!() };
        assert_eq!((tag.as_deref(), *found), (Some("t"), Some(digest)));
        let ImageRef::Registry { tag, .. } = parse(&format!("ghcr.io/a/b@{digest}")) else { panic!() };
        assert_eq!(tag, None);
        assert_eq!(parse(&with_tag.to_string()), with_tag);
    }

    #[test]
    fn the_last_colon_of_a_path_begins_the_tag() {
        let layout = |dir: &str, tag: Option<&str>| ImageRef::Layout { dir: dir.into(), tag: tag.map(str::to_owned) };
        for (text, want) in [
            ("oci:/a/b", layout("/a/b", None)),
            ("oci:/a/b:t", layout("/a/b", Some("t"))),
            ("oci:/a:x/b", layout("/a:x/b", None)),
            ("oci:/a/b:c:t", layout("/a/b:c", Some("t"))),
            ("oci:/a/b:c:", layout("/a/b:c", None)),
        ] {
            assert_eq!(parse(text), want);
            assert_eq!(parse(&want.to_string()), want, "{want}");
        }
        assert_eq!(
            parse("oci-archive:x.tar:v1"),
            ImageRef::LayoutArchive { file: "x.tar".into(), tag: Some("v1".into()) }
        );
    }

    #[test]
    fn what_is_no_reference_is_refused_with_the_forms() {
        for text in
            ["", "oci:", "oci::t", "docker://python", "UPPER/case", "a b", "docker-archive:x.tar", "x@md5:12", "[zz]/a"]
        {
            let error = text.parse::<ImageRef>().unwrap_err();
            assert_eq!(error.kind(), "invalid", "{text}");
            assert!(error.to_string().contains("write"), "{error}");
        }
    }

    fn entry(platform: &str) -> serde_json::Value {
        let mut parts = platform.split('/');
        let mut p = serde_json::json!({"os": parts.next(), "architecture": parts.next()});
        if let Some(variant) = parts.next() {
            p["variant"] = variant.into();
        }
        let digest = Digest::of(platform.as_bytes()).to_string();
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1, "platform": p})
    }

    fn chosen(entries: &[&str], wanted: &str) -> Result<String, SourceError> {
        let list: Vec<Descriptor> =
            serde_json::from_value(entries.iter().map(|e| entry(e)).collect::<serde_json::Value>()).unwrap();
        choose("x", list.iter().filter(|d| !is_attestation(d)), &wanted.parse().unwrap())
            .map(|d| platform_of(d.platform().as_ref().unwrap()).to_string())
    }

    #[test]
    fn platforms_are_chosen_by_variant_and_attestations_never() {
        let arm = ["linux/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "unknown/unknown"];
        assert_eq!(chosen(&arm, "linux/amd64").unwrap(), "linux/amd64");
        assert_eq!(chosen(&arm, "linux/arm").unwrap(), "linux/arm/v7");
        assert_eq!(chosen(&arm, "linux/arm/v6").unwrap(), "linux/arm/v6");
        assert_eq!(chosen(&arm, "linux/arm64").unwrap(), "linux/arm64/v8");
        assert_eq!(chosen(&["linux/arm64"], "linux/arm64/v8").unwrap(), "linux/arm64");
        let error = chosen(&arm, "linux/s390x").unwrap_err().to_string();
        assert!(error.contains("linux/arm/v6") && !error.contains("unknown/"), "{error}");
        assert!(chosen(&arm, "linux/arm/v5").is_err());
        assert_eq!(chosen(&arm, "linux/arm/v8").unwrap(), "linux/arm/v7", "the nearest below");
        assert_eq!(chosen(&["linux/arm/v5", "linux/arm/v6"], "linux/arm/v7").unwrap(), "linux/arm/v6");
        assert_eq!(chosen(&["linux/arm", "linux/arm/v6"], "linux/arm/v7").unwrap(), "linux/arm");
        assert_eq!(chosen(&["linux/arm", "linux/arm/v7"], "linux/arm/v7").unwrap(), "linux/arm/v7");
        assert!(chosen(&["linux/arm"], "linux/arm/v6").is_err(), "none is v7");
        assert_eq!(chosen(&["linux/arm64/v8"], "linux/arm64").unwrap(), "linux/arm64/v8");
        assert_eq!(chosen(&["linux/arm64"], "linux/arm64/v9").unwrap(), "linux/arm64");
        assert_eq!(chosen(&["linux/amd64/v3", "linux/amd64"], "linux/amd64/v2").unwrap(), "linux/amd64");
        assert_eq!(chosen(&["linux/amd64/v3", "linux/amd64"], "linux/amd64").unwrap(), "linux/amd64");
    }

    #[test]
    fn documents_are_told_apart_by_what_they_hold() {
        let kind = |json: &str| Document::parse("x", json.as_bytes()).map(|d| matches!(d, Document::Index(_)));
        assert!(kind(r#"{"schemaVersion":2,"manifests":[]}"#).unwrap());
        let both = r#"{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}"#;
        assert!(kind(both).unwrap_err().to_string().contains("at once"));
        assert!(kind(r#"{"schemaVersion":1,"fsLayers":[]}"#).unwrap_err().to_string().contains("schema 1"));
        assert!(kind("[]").is_err() && kind("{}").is_err() && kind("").is_err());
    }
}
