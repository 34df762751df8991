//! The string maps of CSI, parsed once into types: volume attributes (and the parameters of a StorageClass).

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::archive::Version;
use crate::build::provider::PullPolicy;
use crate::fs::{Integrity, RootView};
use crate::source::{ImageRef, Location, SourceError};
use crate::units::{ParseError, Platform};

/// The volume attributes, in the order in which messages list them.
pub const ATTRIBUTES: &[&str] =
    &["image", "archive", "clipVersion", "platform", "subPath", "root", "integrity", "pullPolicy"];
/// What Kubernetes adds: the provisioner and the kubelet. Some of it is secret (tokens).
const KUBERNETES: &[&str] = &["csi.storage.k8s.io/", "storage.kubernetes.io/"];
/// What the controller tells of an image for people to read: the bytes of its files. It decides nothing.
pub(super) const IMAGE_BYTES: &str = "clip.csi.beam.cloud/image-bytes";
/// Longest value of an attribute in bytes: a path.
const MAX_VALUE: usize = 4095;

/// Why attributes, parameters or secrets can't be used. No message holds a secret's value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttributeError {
    /// A name that we don't know.
    #[error("unknown volume attribute {name:?}{}; known: {}", hint(.suggestion), ATTRIBUTES.join(", "))]
    Unknown {
        /// The name as given, cut.
        name: String,
        /// The known one that it resembles.
        suggestion: Option<&'static str>,
    },
    /// Neither `image` nor `archive`.
    #[error(
        "the volume names nothing to mount: set the attribute image (registry/repo:tag) or archive (s3://bucket/key)"
    )]
    Neither,
    /// Both.
    #[error("the volume has both an image and an archive; keep one of the two attributes")]
    Both,
    /// A value that the attribute can't have.
    #[error("volume attribute {name}: {value:?} is not valid: {remedy}")]
    Value {
        /// The attribute.
        name: &'static str,
        /// The value, cut.
        value: String,
        /// What would be accepted.
        remedy: String,
    },
    /// An attribute that says nothing beside another one.
    #[error("volume attribute {name} has no meaning for an archive; remove it, or name an image")]
    OnlyForImages {
        /// The attribute.
        name: &'static str,
    },
    /// A secret that can't be used; only its key is named.
    #[error("secret key {key:?}: {detail}")]
    Secret {
        /// The key.
        key: String,
        /// Why, and the remedy.
        detail: String,
    },
}

fn hint(suggestion: &Option<&'static str>) -> String {
    suggestion.map(|name| format!(" (did you mean {name}?)")).unwrap_or_default()
}

/// What the volume shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// An image, whose archive is found or built.
    Image(ImageRef),
    /// An archive.
    Archive(Location),
}

/// What Kubernetes says of the pod (`podInfoOnMount`) or the claim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requester {
    /// Namespace of the pod, or of the claim.
    pub namespace: Option<String>,
    /// Name of the pod, or of the claim.
    pub name: Option<String>,
    /// Uid of the pod.
    pub uid: Option<String>,
}

impl Requester {
    /// `namespace/name`.
    pub(super) fn claim(&self) -> String {
        [&self.namespace, &self.name].map(|part| part.as_deref().unwrap_or_default()).join("/")
    }
}

/// For whom a volume is asked for, and so whose words count: in a context that a pod's author writes, only what the kubelet sets itself.
/// It sets `pod.*` over whatever stands there; `pvc/*` is the provisioner's, who does the same in what it sends to the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskedFor {
    /// By the kubelet.
    Pod,
    /// By the provisioner.
    Claim,
}

/// The attributes of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// `image` or `archive`.
    pub source: VolumeSource,
    /// `clipVersion`: what to build where nothing is found; `None`: as configured.
    pub clip_version: Option<Version>,
    /// `platform`; `None`: the node's.
    pub platform: Option<Platform>,
    /// `subPath`, relative, without `..`.
    pub sub_path: Option<String>,
    /// `root`. Default auto.
    pub root: RootView,
    /// `integrity`. Default digest.
    pub integrity: Integrity,
    /// `pullPolicy`. Default IfNotPresent.
    pub pull_policy: PullPolicy,
    /// Our own attributes as they were given: no secret, nothing of Kubernetes.
    pub given: BTreeMap<String, String>,
    /// Who asks.
    pub requester: Requester,
}

impl Attributes {
    /// Parses a volume context or the parameters of a StorageClass. Errors name the attribute and what would be accepted.
    pub fn parse(map: &HashMap<String, String>, asked: AskedFor) -> Result<Self, AttributeError> {
        let (given, requester) = Self::own(map, asked)?;
        Self::typed(given, requester)
    }

    /// Our own attributes and who asks, taken apart; their values are not looked at.
    pub(super) fn own(
        map: &HashMap<String, String>,
        asked: AskedFor,
    ) -> Result<(BTreeMap<String, String>, Requester), AttributeError> {
        let (mut given, mut requester) = (BTreeMap::new(), Requester::default());
        // Sorted, so that the same mistake gives the same message.
        for (name, value) in map.iter().collect::<BTreeMap<_, _>>() {
            match (asked, name.as_str()) {
                (AskedFor::Pod, "csi.storage.k8s.io/pod.namespace")
                | (AskedFor::Claim, "csi.storage.k8s.io/pvc/namespace") => requester.namespace = Some(value.clone()),
                (AskedFor::Pod, "csi.storage.k8s.io/pod.name") | (AskedFor::Claim, "csi.storage.k8s.io/pvc/name") => {
                    requester.name = Some(value.clone());
                }
                (AskedFor::Pod, "csi.storage.k8s.io/pod.uid") => requester.uid = Some(value.clone()),
                (_, IMAGE_BYTES) => {}
                (_, other) if KUBERNETES.iter().any(|prefix| other.starts_with(prefix)) => {}
                (_, other) if ATTRIBUTES.contains(&other) => {
                    given.insert(name.clone(), value.clone());
                }
                (_, other) => return Err(unknown(other)),
            }
        }
        Ok((given, requester))
    }

    fn typed(given: BTreeMap<String, String>, requester: Requester) -> Result<Self, AttributeError> {
        let get = |name: &'static str| -> Result<Option<&str>, AttributeError> {
            match given.get(name).map(String::as_str) {
                Some("") => Err(invalid(name, "", "it is empty; leave it out or give it a value")),
                Some(value) if value.len() > MAX_VALUE || value.chars().any(char::is_control) => {
                    Err(invalid(name, value, format!("at most {MAX_VALUE} bytes, no control characters")))
                }
                value => Ok(value),
            }
        };
        let source = match (get("image")?, get("archive")?) {
            (Some(_), Some(_)) => return Err(AttributeError::Both),
            (None, None) => return Err(AttributeError::Neither),
            (Some(image), None) => VolumeSource::Image(image.parse().map_err(|error| located("image", image, &error))?),
            (None, Some(archive)) => VolumeSource::Archive(
                Location::parse_archive(archive).map_err(|error| located("archive", archive, &error))?,
            ),
        };
        let of_image = |name: &'static str| match get(name)? {
            Some(_) if matches!(source, VolumeSource::Archive(_)) => Err(AttributeError::OnlyForImages { name }),
            value => Ok(value),
        };
        let platform = of_image("platform")?
            .map(|text| text.parse().map_err(|error: ParseError| invalid("platform", text, error.remedy)))
            .transpose()?;
        let pull_policy = choice(
            "pullPolicy",
            of_image("pullPolicy")?,
            &[("Always", PullPolicy::Always), ("IfNotPresent", PullPolicy::IfNotPresent), ("Never", PullPolicy::Never)],
        )?;
        let clip_version =
            choice("clipVersion", get("clipVersion")?, &[("0", Version::V1), ("1", Version::V1), ("2", Version::V2)])?;
        let root = choice(
            "root",
            get("root")?,
            &[("auto", RootView::Auto), ("bundle", RootView::Bundle), ("archive", RootView::Archive)],
        )?;
        let integrity =
            choice("integrity", get("integrity")?, &[("digest", Integrity::Digest), ("strict", Integrity::Strict)])?;
        let sub_path = get("subPath")?.map(sub_path).transpose()?;
        Ok(Self {
            source,
            clip_version,
            platform,
            sub_path,
            root: root.unwrap_or_default(),
            integrity: integrity.unwrap_or_default(),
            pull_policy: pull_policy.unwrap_or_default(),
            requester,
            given,
        })
    }
}

fn invalid(name: &'static str, value: &str, remedy: impl Into<String>) -> AttributeError {
    AttributeError::Value { name, value: super::request::cut(value), remedy: remedy.into() }
}

/// The parser's own words, which name the value already where they are about it.
fn located(name: &'static str, value: &str, error: &SourceError) -> AttributeError {
    let remedy = match error {
        SourceError::Invalid { detail, .. } => detail.clone(),
        other => other.to_string(),
    };
    invalid(name, value, remedy)
}

fn choice<T: Copy>(
    name: &'static str,
    value: Option<&str>,
    choices: &[(&'static str, T)],
) -> Result<Option<T>, AttributeError> {
    let Some(value) = value else { return Ok(None) };
    match choices.iter().find(|(word, _)| *word == value) {
        Some((_, choice)) => Ok(Some(*choice)),
        None => {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            Err(invalid(name, value, format!("write one of {}", words.join(", "))))
        }
    }
}

/// Relative to the shown root; `.` parts and double slashes are dropped, so that equal paths compare equal.
fn sub_path(text: &str) -> Result<String, AttributeError> {
    let refuse = |remedy: &str| Err(invalid("subPath", text, remedy));
    if text.starts_with('/') {
        return refuse("it is relative to the image's root; write usr/lib, not /usr/lib");
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return refuse(".. is refused; name the directory itself");
    }
    if parts.is_empty() {
        return refuse("it names the root; leave it out");
    }
    Ok(parts.join("/"))
}

pub(super) fn unknown(name: &str) -> AttributeError {
    let name: String = name.chars().take(64).collect();
    let lower = name.to_lowercase();
    let closest = ATTRIBUTES
        .iter()
        .map(|known| (strsim::damerau_levenshtein(&lower, &known.to_lowercase()), *known))
        .min_by_key(|(distance, _)| *distance);
    // A third of the name may differ: "imgae", "pullpolicy", "subpaths", but not "foo".
    let suggestion = closest.filter(|(distance, known)| *distance <= known.len() / 3).map(|(_, known)| known);
    AttributeError::Unknown { name, suggestion }
}

impl fmt::Display for VolumeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(image) => write!(f, "image {image}"),
            Self::Archive(location) => write!(f, "archive {}", archive_url(location)),
        }
    }
}

/// A location as the attribute `archive` names it; [`Location::parse_archive`] reads it back. Only files and objects can
/// be archives; other locations are described.
pub(super) fn archive_url(location: &Location) -> String {
    match location {
        Location::File(path) => format!("file://{}", path.display()),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Attributes, AttributeError> {
        let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Attributes::parse(&map, AskedFor::Pod)
    }

    const IMAGE: (&str, &str) = ("image", "registry.example/team/app:1");

    #[test]
    fn all_attributes_become_types() {
        let parsed = parse(&[
            IMAGE,
            ("clipVersion", "2"),
            ("platform", "linux/arm64/v8"),
            ("subPath", "./usr//lib/"),
            ("root", "bundle"),
            ("integrity", "strict"),
            ("pullPolicy", "Always"),
        ])
        .unwrap();
        assert_eq!(parsed.source, VolumeSource::Image(IMAGE.1.parse().unwrap()));
        assert_eq!(parsed.clip_version, Some(Version::V2));
        assert_eq!(parsed.platform.unwrap().to_string(), "linux/arm64/v8");
        assert_eq!(parsed.sub_path.as_deref(), Some("usr/lib"));
        assert_eq!(
            (parsed.root, parsed.integrity, parsed.pull_policy),
            (RootView::Bundle, Integrity::Strict, PullPolicy::Always)
        );
        assert_eq!(parse(&[IMAGE, ("clipVersion", "0")]).unwrap().clip_version, Some(Version::V1));
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let parsed = parse(&[IMAGE]).unwrap();
        assert_eq!(parsed.clip_version, None);
        assert_eq!(
            (parsed.root, parsed.integrity, parsed.pull_policy, parsed.sub_path),
            (RootView::Auto, Integrity::Digest, PullPolicy::IfNotPresent, None)
        );
    }

    #[test]
    fn exactly_one_of_image_and_archive() {
        assert_eq!(parse(&[]), Err(AttributeError::Neither));
        assert_eq!(parse(&[IMAGE, ("archive", "s3://b/k")]), Err(AttributeError::Both));
        assert_eq!(
            parse(&[("archive", "s3://b/k.clip")]).unwrap().source,
            VolumeSource::Archive(Location::parse_archive("s3://b/k.clip").unwrap())
        );
    }

    #[test]
    fn an_unknown_attribute_is_named_with_the_one_that_was_meant_and_all_that_exist() {
        let message = parse(&[IMAGE, ("subpath", "x")]).unwrap_err().to_string();
        assert!(message.contains("\"subpath\" (did you mean subPath?)"), "{message}");
        assert!(ATTRIBUTES.iter().all(|name| message.contains(name)), "{message}");
        let message = parse(&[IMAGE, ("imgae", "x")]).unwrap_err().to_string();
        assert!(message.contains("did you mean image?"), "{message}");
        let message = parse(&[IMAGE, ("bananas", "x")]).unwrap_err().to_string();
        assert!(message.contains("bananas") && !message.contains("did you mean"), "{message}");
        let long = "x".repeat(100_000);
        assert!(parse(&[IMAGE, (&long, "x")]).unwrap_err().to_string().len() < 400);
    }

    #[test]
    fn what_kubernetes_adds_is_accepted_and_kept_out_of_the_journal() {
        let parsed = parse(&[
            IMAGE,
            ("csi.storage.k8s.io/serviceAccount.tokens", "{\"a\":\"token\"}"),
            ("csi.storage.k8s.io/pod.namespace", "team"),
            ("csi.storage.k8s.io/pod.name", "pod-1"),
            ("csi.storage.k8s.io/pod.uid", "0-1-2"),
            ("clip.csi.beam.cloud/image-bytes", "123"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "x"),
        ])
        .unwrap();
        assert_eq!(parsed.given.keys().collect::<Vec<_>>(), ["image"]);
        assert_eq!(parsed.requester.namespace.as_deref(), Some("team"));
        assert_eq!(parsed.requester.uid.as_deref(), Some("0-1-2"));
        assert!(!format!("{parsed:?}").contains("token"));
    }

    /// The author of a pod writes what the kubelet does not set, and must not pass for another team by it.
    #[test]
    fn a_pod_can_not_name_a_namespace_by_what_the_provisioner_says() {
        let forged = [
            IMAGE,
            ("csi.storage.k8s.io/pod.namespace", "own"),
            ("csi.storage.k8s.io/pvc/namespace", "theirs"),
            ("csi.storage.k8s.io/pvc/name", "claim"),
        ];
        assert_eq!(
            parse(&forged).unwrap().requester,
            Requester { namespace: Some("own".into()), ..Requester::default() }
        );
        assert_eq!(parse(&[forged[0], forged[2]]).unwrap().requester, Requester::default());
        let map = forged.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(Attributes::parse(&map, AskedFor::Claim).unwrap().requester.claim(), "theirs/claim");
    }

    #[test]
    fn a_value_that_is_not_accepted_is_answered_with_those_that_are() {
        let cases = [
            ("clipVersion", "3", "0, 1, 2"),
            ("root", "Bundle", "auto, bundle, archive"),
            ("integrity", "none", "digest, strict"),
            ("pullPolicy", "always", "Always, IfNotPresent, Never"),
            ("platform", "arm64", "os/arch"),
            ("subPath", "/etc", "relative"),
            ("subPath", "a/../../b", ".. is refused"),
            ("subPath", ".", "leave it out"),
            ("root", "", "leave it out"),
            ("subPath", "a\nb", "control characters"),
        ];
        for (name, value, remedy) in cases {
            let message = parse(&[IMAGE, (name, value)]).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(remedy) && !message.contains('\n'), "{message}");
        }
        assert!(parse(&[IMAGE, ("subPath", &"a".repeat(5000))]).is_err());
    }

    #[test]
    fn attributes_of_images_are_refused_beside_an_archive() {
        for attribute in [("platform", "linux/amd64"), ("pullPolicy", "Always")] {
            let error = parse(&[("archive", "s3://b/k"), attribute]).unwrap_err();
            assert_eq!(error, AttributeError::OnlyForImages { name: attribute.0 });
        }
    }

    #[test]
    fn an_archive_url_reads_back_as_the_same_location() {
        let s3 = |key: &str| Location::S3 {
            endpoint: "http://127.0.0.1:9000".into(),
            region: "eu-west-1".into(),
            bucket: "b".into(),
            key: key.into(),
            path_style: true,
        };
        for location in [s3("a/b.clip"), s3("50 %/what?#1&a=b+c.clip"), Location::File("/srv/a.clip".into())] {
            assert_eq!(Location::parse_archive(&archive_url(&location)).unwrap(), location);
        }
    }
}
