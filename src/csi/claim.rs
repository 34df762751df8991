//! What a claim may say: `allowImageFromPVC` lets the author of a PersistentVolumeClaim choose what its volume shows, by
//! annotations, where the author of the StorageClass wants that.
//!
//! Whoever may write claims then spends the credentials that the class lends. So these must be the claim's own: a class
//! with a secret of another namespace is refused. CSI does not tell where a secret came from (the provisioner keeps those
//! parameters to itself), so the class is read through the API; that takes no right on secrets.

use std::collections::{BTreeMap, HashMap};

use super::request::RequestError;
use super::volume_context::{ATTRIBUTES, AskedFor, AttributeError, Attributes, Requester, unknown};
use crate::k8s::{Claim, KubeApi, KubeError, Object, PREFIX};
use crate::source::ImageRef;

/// The parameter of a StorageClass.
pub(super) const ALLOW: &str = "allowImageFromPVC";
/// Parameters that the provisioner keeps to itself.
const PROVISIONERS: &str = "csi.storage.k8s.io/";
/// What every namespace of a secret in such a class must be.
const OWN_NAMESPACE: &str = "${pvc.namespace}";

/// Names the class too, older than `storageClassName`, and the provisioner heeds it first. So it must be heeded here: a claim
/// that names one class in each would else have one looked at and the other's secret spent.
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

/// Why a claim can't say what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// There is no API.
    #[error(
        "the StorageClass has {ALLOW}, but this controller has no access to the Kubernetes API; set k8s.enabled, or name the \
         image in the StorageClass"
    )]
    NoApi,
    /// The provisioner does not say which claim it is.
    #[error(
        "the StorageClass has {ALLOW}, but the call names no claim; run csi-provisioner with --extra-create-metadata"
    )]
    NoMetadata,
    /// The claim, or its class, is not there (any more).
    #[error("{what} does not exist; nothing is provisioned for it")]
    Gone {
        /// Kind and name.
        what: String,
    },
    /// The claim of that name is another one by now.
    #[error(
        "claim {claim} was deleted and made anew since volume {volume} was asked for; nothing is provisioned for the old one"
    )]
    Replaced {
        /// Namespace and name of the claim.
        claim: String,
        /// The volume's name.
        volume: String,
    },
    /// An annotation says what the class has said.
    #[error("annotation {PREFIX}{name} of claim {claim}: the StorageClass fixes {name}; remove the annotation")]
    Fixed {
        /// The attribute.
        name: String,
        /// Namespace and name of the claim.
        claim: String,
    },
    /// The class lends credentials that are not the claim's own.
    #[error(
        "StorageClass {class} has {ALLOW} and takes a secret from another namespace ({key}: {value:?}): claims could read \
         images with it that they may not; set {key}: {OWN_NAMESPACE}, or name the image in the StorageClass"
    )]
    ForeignSecret {
        /// The class.
        class: String,
        /// Its parameter.
        key: String,
        /// Its value, cut.
        value: String,
    },
    /// The call is not of the class that the claim names.
    #[error(
        "claim {claim} names StorageClass {class}, which says something else than this call; delete the claim and make it anew"
    )]
    OtherClass {
        /// The class.
        class: String,
        /// Namespace and name of the claim.
        claim: String,
    },
    /// A claim may name registries, not the controller's disk.
    #[error("annotation {PREFIX}image of claim {claim}: a claim may name an image of a registry only, no local layout")]
    Layout {
        /// Namespace and name of the claim.
        claim: String,
    },
    /// The API.
    #[error(transparent)]
    Api(#[from] KubeError),
}

/// The parameters of a StorageClass: our own, and whether the claim may add to them.
#[derive(Debug)]
pub(super) struct Parameters {
    /// As they came.
    all: HashMap<String, String>,
    /// The claim's annotations count.
    pub from_claim: bool,
    /// Our own, [`ALLOW`] among them: what makes two calls of one name the same.
    pub own: BTreeMap<String, String>,
    /// The claim, where the provisioner says.
    pub requester: Requester,
}

impl Parameters {
    /// Refuses names that we don't know.
    pub fn parse(mut all: HashMap<String, String>) -> Result<Self, AttributeError> {
        let allow = all.remove(ALLOW);
        let from_claim = match allow.as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                let (value, remedy) = (super::request::cut(other), "write \"true\" or \"false\"".to_owned());
                return Err(AttributeError::Value { name: ALLOW, value, remedy });
            }
        };
        let (mut own, requester) = Attributes::own(&all, AskedFor::Claim)?;
        own.extend(allow.map(|value| (ALLOW.to_owned(), value)));
        Ok(Self { all, from_claim, own, requester })
    }

    /// The attributes where the claim adds nothing.
    pub fn attributes(&self) -> Result<Attributes, AttributeError> {
        Attributes::parse(&self.all, AskedFor::Claim)
    }

    /// The attributes with what the claim adds.
    pub fn with(&self, annotations: BTreeMap<String, String>) -> Result<Attributes, AttributeError> {
        let mut all = self.all.clone();
        all.extend(annotations);
        Attributes::parse(&all, AskedFor::Claim)
    }
}

/// The claim that a volume is for.
pub(super) async fn read(api: &dyn KubeApi, requester: &Requester) -> Result<Claim, ClaimError> {
    let (Some(namespace), Some(name)) = (&requester.namespace, &requester.name) else {
        return Err(ClaimError::NoMetadata);
    };
    let claim = api.claim(namespace, name).await?;
    claim.ok_or_else(|| ClaimError::Gone { what: format!("claim {namespace}/{name}") })
}

/// The provisioner names a volume after its claim's uid: what a claim of the same name that came later says is not for it. A
/// provisioner that was told to name volumes otherwise gives nothing to compare.
pub(super) fn check_uid(volume: &str, requester: &Requester, claim: &Claim) -> Result<(), ClaimError> {
    let is_uid = |text: &str| {
        let bytes = text.as_bytes();
        let shape = |(at, byte): (usize, &u8)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        };
        bytes.len() == 36 && bytes.iter().enumerate().all(shape)
    };
    let named = volume.get(volume.len().saturating_sub(36)..).filter(|uid| is_uid(uid));
    match named {
        Some(uid) if !uid.eq_ignore_ascii_case(&claim.uid) => {
            Err(ClaimError::Replaced { claim: requester.claim(), volume: volume.to_owned() })
        }
        _ => Ok(()),
    }
}

/// What Events about a claim name.
pub(super) fn object(requester: &Requester, claim: &Claim) -> Object {
    Object {
        kind: "PersistentVolumeClaim",
        namespace: requester.namespace.clone().unwrap_or_default(),
        name: requester.name.clone().unwrap_or_default(),
        uid: claim.uid.clone(),
    }
}

/// What the annotations of a claim say, by attribute: only what the class leaves open, and only where no credential of
/// another namespace is in play.
pub(super) async fn annotations(
    api: &dyn KubeApi,
    parameters: &Parameters,
    claim: &Claim,
) -> Result<BTreeMap<String, String>, RequestError> {
    let requester = &parameters.requester;
    let of = || requester.claim();
    let class = claim.annotations.get(CLASS_ANNOTATION).or(claim.storage_class.as_ref()).cloned().unwrap_or_default();
    let gone = || ClaimError::Gone { what: format!("StorageClass {class:?} of claim {}", of()) };
    if class.is_empty() {
        return Err(gone().into());
    }
    let lent = api.class_parameters(&class).await.map_err(ClaimError::Api)?.ok_or_else(gone)?;
    let says = lent.iter().filter(|(key, _)| !key.starts_with(PROVISIONERS));
    if !says.eq(&parameters.own) {
        return Err(ClaimError::OtherClass { class, claim: of() }.into());
    }
    let secret_namespace = |key: &str| {
        let key = key.to_ascii_lowercase();
        key.contains("secret") && key.ends_with("namespace")
    };
    for (key, value) in lent.into_iter().filter(|(key, _)| secret_namespace(key)) {
        if value != OWN_NAMESPACE && Some(&value) != requester.namespace.as_ref() {
            return Err(ClaimError::ForeignSecret { class, key, value: super::request::cut(&value) }.into());
        }
    }
    let mut said = BTreeMap::new();
    for (annotation, value) in &claim.annotations {
        let Some(name) = annotation.strip_prefix(PREFIX) else { continue };
        if !ATTRIBUTES.contains(&name) {
            return Err(unknown(name).into());
        }
        let other = match name {
            "image" => "archive",
            "archive" => "image",
            same => same,
        };
        if let Some(fixed) = [name, other].into_iter().find(|name| parameters.own.contains_key(*name)) {
            return Err(ClaimError::Fixed { name: fixed.to_owned(), claim: of() }.into());
        }
        let local = |image: ImageRef| !matches!(image, ImageRef::Registry { .. });
        if name == "image" && value.parse().is_ok_and(local) {
            return Err(ClaimError::Layout { claim: of() }.into());
        }
        said.insert(name.to_owned(), value.clone());
    }
    Ok(said)
}
