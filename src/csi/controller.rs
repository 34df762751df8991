//! The Controller service: volumes by StorageClass.
//!
//! The truth is one record per volume in the archive store. CreateVolume finds or builds the image's archive first, puts
//! it into the store and writes the record last, so a record never names an archive that is not there; an archive that
//! no record names is collected later. Nodes are told everything in the volume context.
//!
//! Where the StorageClass lets a claim choose (`claim.rs`), what it chose is kept in the record: a retry after the claim
//! was changed gives the same volume.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::claim::{self, ClaimError, Parameters};
use super::node::note;
use super::operations::{Call, Operations};
use super::proto::v1::controller_server::Controller;
use super::proto::v1::controller_service_capability::{self, Rpc, rpc};
use super::proto::v1::validate_volume_capabilities_response::Confirmed;
use super::proto::v1::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume,
};
use super::request::{self, RequestError};
use super::seam::{Images, Volumes, building, progress};
use super::secrets::credentials;
use super::status::aborted;
use super::volume_context::{AskedFor, Attributes, IMAGE_BYTES, Requester, VolumeSource, archive_url};
use super::{ClipVersion, ControllerContext};
use crate::archive::Version;
use crate::build::provider::{self, Provided};
use crate::build::store::{ArchiveStore, VolumeRecord};
use crate::k8s::Kubernetes;
use crate::k8s::events::Severity;
use crate::metrics::metrics;
use crate::source::{Credentials, ImageRef, Location};
use crate::units::{Digest, Platform};

/// Provisions volumes.
#[derive(Debug, Clone)]
pub(super) struct ControllerService {
    default_version: ClipVersion,
    wait: Duration,
    images: Arc<dyn Images>,
    volumes: Option<Arc<dyn Volumes>>,
    kubernetes: Kubernetes,
    operations: Operations<Option<Volume>>,
}

/// `v1-` and 32 hex digits of SHA-256 of the name: fits CSI's 128 bytes whatever the name is.
fn volume_id(name: &str) -> String {
    let hex = Digest::of(name.as_bytes()).hex();
    format!("v1-{}", hex.get(..32).unwrap_or(&hex))
}

/// Digest over the parameters that are ours, as given.
fn parameters_digest(given: &BTreeMap<String, String>) -> Digest {
    Digest::of(serde_json::json!(given).to_string().as_bytes())
}

/// A CreateVolume, checked and parsed.
#[derive(Debug)]
struct Create {
    id: String,
    name: String,
    /// [`parameters_digest`] of what the StorageClass says.
    parameters: Digest,
    /// The claim had a say in the attributes.
    from_claim: bool,
    attributes: Attributes,
    credentials: Credentials,
    asks_to_write: bool,
}

impl ControllerService {
    async fn parse(&self, request: CreateVolumeRequest) -> Result<Create, Status> {
        let parameters = check(&request)?;
        let (id, name) = (volume_id(&request.name), request.name);
        let digest = parameters_digest(&parameters.own);
        let credentials = credentials(&request.secrets, parameters.requester.namespace.as_deref());
        let credentials = credentials.map_err(RequestError::from)?;
        let attributes = if parameters.from_claim {
            self.settle(&id, &name, digest, &parameters).await?
        } else {
            parameters.attributes().map_err(RequestError::from)?
        };
        let asks_to_write = request::asks_to_write(&request.volume_capabilities);
        let from_claim = parameters.from_claim;
        Ok(Create { id, name, parameters: digest, from_claim, attributes, credentials, asks_to_write })
    }

    /// The attributes of a volume whose claim has a say in them: as they were when it was created, else as the claim says
    /// now.
    async fn settle(
        &self,
        id: &str,
        name: &str,
        digest: Digest,
        parameters: &Parameters,
    ) -> Result<Attributes, Status> {
        let requester = &parameters.requester;
        if let Some(record) = self.volumes()?.record(id).await? {
            if record.parameters != digest {
                return Err(RequestError::NameTaken { name: name.to_owned() }.into());
            }
            let given = record.attributes.unwrap_or_default();
            return Ok(parameters.with(given).map_err(RequestError::from)?);
        }
        let api = self.kubernetes.api.as_deref().ok_or(ClaimError::NoApi).map_err(RequestError::from)?;
        let claim = claim::read(api, requester).await.map_err(RequestError::from)?;
        claim::check_uid(name, requester, &claim).map_err(RequestError::from)?;
        let said = claim::annotations(api, parameters, &claim).await?;
        Ok(parameters.with(said).map_err(RequestError::from)?)
    }

    /// Tells of a claim, in the background: its uid has to be asked for. Nothing where the API or the claim is not there.
    fn tell(&self, requester: &Requester, severity: Severity, reason: &'static str, message: String) {
        let Some(api) = self.kubernetes.api.clone() else { return };
        let (events, requester) = (self.kubernetes.events.clone(), requester.clone());
        tokio::spawn(async move {
            match claim::read(api.as_ref(), &requester).await {
                Ok(claim) => events.tell(&claim::object(&requester, &claim), severity, reason, &message),
                Err(error) => tracing::debug!(reason, "no event on the claim: {error}"),
            }
        });
    }
}

/// What has to be right whatever the volume shows.
fn check(request: &CreateVolumeRequest) -> Result<Parameters, RequestError> {
    request::id("name", &request.name)?;
    request::capabilities("volume_capabilities", &request.volume_capabilities)?;
    request::capacity(request.capacity_range.as_ref())?;
    let unusable = |field, detail: &str| Err(RequestError::Unusable { field, detail: detail.to_owned() });
    if request.volume_content_source.is_some() {
        return unusable(
            "volume_content_source",
            "an image is neither cloned nor restored; name it in the StorageClass",
        );
    }
    if !request.mutable_parameters.is_empty() {
        return unusable("mutable_parameters", "volumes can't be modified; remove the VolumeAttributesClass");
    }
    Ok(Parameters::parse(request.parameters.clone())?)
}

impl ControllerService {
    pub fn new(context: &ControllerContext) -> Self {
        Self {
            default_version: context.clip_version,
            wait: context.config.publish_wait(),
            images: context.images.clone(),
            volumes: context.volumes.clone(),
            kubernetes: context.kubernetes.clone(),
            operations: Operations::default(),
        }
    }

    /// Lets what is under way end. False: something has not within `grace`.
    pub async fn drain(&self, grace: Duration) -> bool {
        self.operations.drain(grace).await
    }

    fn volumes(&self) -> Result<Arc<dyn Volumes>, RequestError> {
        self.volumes.clone().ok_or(RequestError::NoStore)
    }

    async fn create(self, create: Create, cancel: CancellationToken) -> Result<Option<Volume>, Status> {
        let volumes = self.volumes()?;
        let parameters = create.parameters;
        let taken = || RequestError::NameTaken { name: create.name.clone() };
        // Before anything is built: the name may be taken.
        let existing = volumes.record(&create.id).await?;
        let record = match existing {
            Some(record) => record,
            None => {
                let record = self.provision(&create, volumes.as_ref(), &cancel).await?;
                // Another controller may have been faster: then its record holds.
                volumes.create_record(&record).await?.unwrap_or(record)
            }
        };
        if record.parameters != parameters {
            return Err(taken().into());
        }
        // Where another controller was faster, the claim may have said something else to it.
        let winner = record.attributes.as_ref().filter(|given| **given != create.attributes.given);
        let winner =
            winner.map(|given| Attributes::parse(&given.clone().into_iter().collect(), AskedFor::Claim)).transpose();
        let winner = winner.map_err(RequestError::from)?;
        let volume_context = context(winner.as_ref().unwrap_or(&create.attributes), &record, volumes.as_ref());
        tracing::info!(id = record.id, source = %create.attributes.source, "volume created");
        if create.asks_to_write {
            tracing::info!(id = record.id, "the claim asks for a mode that could write; the volume is read-only");
            let message =
                "the volume is an image and mounts read-only, whatever the claim's access mode; ReadOnlyMany says so";
            self.tell(&create.attributes.requester, Severity::Normal, "ReadOnlyVolume", message.to_owned());
        }
        Ok(Some(Volume { capacity_bytes: 0, volume_id: record.id, volume_context, ..Volume::default() }))
    }

    /// Makes sure of the archive; the record that shall be written.
    async fn provision(
        &self,
        create: &Create,
        volumes: &dyn Volumes,
        cancel: &CancellationToken,
    ) -> Result<VolumeRecord, Status> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
        let record = VolumeRecord {
            id: create.id.clone(),
            name: create.name.clone(),
            parameters: create.parameters,
            image: None,
            manifest_digest: None,
            archive: None,
            created,
            image_bytes: None,
            attributes: create.from_claim.then(|| create.attributes.given.clone()),
        };
        let image = match &create.attributes.source {
            // The node's policy and credentials decide whether it may be read: this is another machine.
            VolumeSource::Archive(location) => {
                return Ok(VolumeRecord { archive: Some(archive_url(location)), ..record });
            }
            VolumeSource::Image(image) => image,
        };
        let platform = create.attributes.platform.clone().unwrap_or_else(Platform::host);
        let request = provider::Request {
            image: image.clone(),
            platform: platform.clone(),
            version: self.version(image, &create.attributes),
            pull_policy: create.attributes.pull_policy,
            credentials: create.credentials.clone(),
        };
        let provided = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(aborted("the creation was given up: the controller is stopping")),
            provided = self.images.provide(&request) => provided?,
        };
        let version = version_of(&provided.location, &provided.manifest_digest, &platform);
        if request.version == Version::V2 && version == Version::V1 && provided.from == "built" {
            self.tell(&create.attributes.requester, Severity::Warning, "FellBackToV1", fell_back(image));
        }
        let image_bytes = self.image_bytes(&provided).await;
        let name = ArchiveStore::archive_name(&provided.manifest_digest, &platform, version);
        // Also one that came from there: whoever cleans up must see that it is used.
        let file = match &provided.location {
            Location::File(file) => Some(file.as_path()),
            _ => None,
        };
        volumes.put(&name, file, image).await?;
        Ok(VolumeRecord {
            image: Some(image.to_string()),
            manifest_digest: Some(provided.manifest_digest),
            archive: Some(name),
            image_bytes,
            ..record
        })
    }

    /// For people only: a volume does not fail for want of it.
    async fn image_bytes(&self, provided: &Provided) -> Option<u64> {
        let size = self.images.content_bytes(provided).await;
        size.inspect_err(|error| tracing::warn!(%error, "the image's size can't be told")).ok()
    }

    /// A v2 index of a layout could be mounted on this machine only: v1 is built of it.
    fn version(&self, image: &ImageRef, attributes: &Attributes) -> Version {
        let (version, because) = self.default_version.resolve(attributes.clip_version);
        if version == Version::V2 && !matches!(image, ImageRef::Registry { .. }) {
            metrics().build_fallbacks.inc();
            tracing::warn!(%image, "a v2 index of a layout would be of no use to other machines: building v1");
            let message = format!(
                "{image} is a layout on this machine: a v2 index of it would be of no use elsewhere, so v1 is built"
            );
            self.tell(&attributes.requester, Severity::Warning, "FellBackToV1", message);
            return Version::V1;
        }
        tracing::debug!(?version, because, "version to build where no archive is found");
        version
    }
}

/// The message of the Event `FellBackToV1`.
pub(super) fn fell_back(image: &ImageRef) -> String {
    format!(
        "no v2 index can be built of {image}: a v1 archive with all of its data was built instead; the plugin's log says why"
    )
}

/// What was made: after a fallback not what was asked for. The file's name tells.
pub(super) fn version_of(location: &Location, manifest: &Digest, platform: &Platform) -> Version {
    let name = match location {
        Location::File(path) => path.to_string_lossy(),
        Location::S3 { key, .. } => key.as_str().into(),
        // The store names them by tag: the file's name, without its ending.
        Location::Artifact { reference, .. } => format!("{reference}.clip").into(),
        Location::Registry { .. } | Location::Layout { .. } => "".into(),
    };
    let v2 = ArchiveStore::file_name(manifest, platform, Version::V2);
    if name.ends_with(&v2) { Version::V2 } else { Version::V1 }
}

/// What a node needs: the attributes as given, the image pinned to the manifest that was found, and version and platform
/// of the archive in the store, so that the node finds just that. An image of a layout becomes an archive of the store.
fn context(attributes: &Attributes, record: &VolumeRecord, volumes: &dyn Volumes) -> HashMap<String, String> {
    let mut context: HashMap<String, String> = attributes.given.clone().into_iter().collect();
    context.extend(record.image_bytes.map(|bytes| (IMAGE_BYTES.to_owned(), bytes.to_string())));
    let VolumeSource::Image(image) = &attributes.source else { return context };
    let name = record.archive.as_deref().unwrap_or_default();
    match (image, record.manifest_digest) {
        (ImageRef::Registry { registry, repository, .. }, Some(digest)) => {
            let pinned = ImageRef::Registry {
                registry: registry.clone(),
                repository: repository.clone(),
                tag: None,
                digest: Some(digest),
            };
            // The record's: another controller may have made it, on another machine.
            let recorded = || ArchiveStore::platform_of(name);
            let platform = attributes.platform.clone().or_else(recorded).unwrap_or_else(Platform::host);
            let version = if name.ends_with("-v2.clip") { "2" } else { "1" };
            context.insert("image".to_owned(), pinned.to_string());
            context.insert("platform".to_owned(), platform.to_string());
            context.insert("clipVersion".to_owned(), version.to_owned());
        }
        _ => {
            ["image", "platform", "pullPolicy"].iter().for_each(|key| drop(context.remove(*key)));
            context.insert("archive".to_owned(), volumes.archive_url(name));
        }
    }
    context
}

#[async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let deadline = request::deadline(&request, self.wait);
        let request = request.into_inner();
        note(&volume_id(&request.name), "");
        let create = self.parse(request).await?;
        self.volumes()?;
        let identity = create.credentials.identity.map(|identity| identity.hex());
        let fingerprint = serde_json::json!([create.attributes.given, create.parameters, identity]).to_string();
        let (id, source) = (create.id.clone(), create.attributes.source.clone());
        let requester = create.attributes.requester.clone();
        let call = Call {
            key: &id,
            kind: "create",
            fingerprint: Digest::of(fingerprint.as_bytes()),
            deadline,
            what: format!("making a volume of {source}"),
            progress: &|| progress(self.images.as_ref(), &source),
            preempts: None,
        };
        let volume =
            self.operations.run(call, |cancel| self.clone().create(create, cancel)).await.inspect_err(|status| {
                if let Some(message) = building(status, self.images.as_ref(), &source) {
                    self.tell(&requester, Severity::Normal, "ArchiveBuilding", message);
                }
            })?;
        Ok(Response::new(CreateVolumeResponse { volume }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let deadline = request::deadline(&request, self.wait);
        let request = request.into_inner();
        note(&request.volume_id, "");
        let id = request::id("volume_id", &request.volume_id)?.to_owned();
        let volumes = self.volumes()?;
        let call = Call {
            key: &request.volume_id,
            kind: "delete",
            fingerprint: Digest::of(&[]),
            deadline,
            what: "deleting the volume".to_owned(),
            progress: &|| None,
            preempts: None,
        };
        // The archive stays: other volumes may name it, and the clean-up counts.
        let delete = |_| async move {
            volumes.delete_record(&id).await?;
            Ok(None)
        };
        self.operations.run(call, delete).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        note(&request.volume_id, "");
        let id = request::id("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(RequestError::Missing { field: "volume_capabilities" }.into());
        }
        let Some(record) = self.volumes()?.record(id).await? else {
            return Err(RequestError::UnknownVolume { id: request::cut(id) }.into());
        };
        let checked = request::capabilities("volume_capabilities", &request.volume_capabilities).and_then(|()| {
            if request.parameters.is_empty() {
                return Ok(());
            }
            let parameters = parameters_digest(&Parameters::parse(request.parameters.clone())?.own);
            if parameters == record.parameters { Ok(()) } else { Err(RequestError::NameTaken { name: record.name }) }
        });
        Ok(Response::new(match checked {
            Ok(()) => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: HashMap::new(),
                }),
                message: String::new(),
            },
            Err(why) => ValidateVolumeCapabilitiesResponse { confirmed: None, message: why.to_string() },
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let rpc = Rpc { r#type: rpc::Type::CreateDeleteVolume.into() };
        let capability = ControllerServiceCapability { r#type: Some(controller_service_capability::Type::Rpc(rpc)) };
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }
}
