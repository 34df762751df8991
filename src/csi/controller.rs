//! The Controller service: volumes by StorageClass.
//!
//! The truth is one record per volume in the archive store. CreateVolume finds or builds the image's archive first, puts
//! it into the store and writes the record last, so a record never names an archive that is not there; an archive that
//! no record names is collected later. Nodes are told everything in the volume context.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

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
use super::seam::{Images, Volumes, progress};
use super::secrets::credentials;
use super::status::aborted;
use super::volume_context::{Attributes, VolumeSource, archive_url};
use super::{ClipVersion, ControllerContext};
use crate::archive::Version;
use crate::build::provider;
use crate::build::store::{ArchiveStore, VolumeRecord};
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
    attributes: Attributes,
    credentials: Credentials,
}

impl Create {
    fn parse(request: CreateVolumeRequest) -> Result<Self, RequestError> {
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
        let attributes = Attributes::parse(&request.parameters)?;
        let credentials = credentials(&request.secrets, attributes.requester.namespace.as_deref())?;
        Ok(Self { id: volume_id(&request.name), name: request.name, attributes, credentials })
    }
}

impl ControllerService {
    pub fn new(context: &ControllerContext) -> Self {
        Self {
            default_version: context.clip_version,
            wait: context.config.publish_wait(),
            images: context.images.clone(),
            volumes: context.volumes.clone(),
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
        let parameters = parameters_digest(&create.attributes.given);
        let taken = || RequestError::NameTaken { name: create.name.clone() };
        // Before anything is built: the name may be taken.
        let existing = volumes.record(&create.id).await?;
        let record = match existing {
            Some(record) => record,
            None => {
                let record = self.provision(&create, parameters, volumes.as_ref(), &cancel).await?;
                // Another controller may have been faster: then its record holds.
                volumes.create_record(&record).await?.unwrap_or(record)
            }
        };
        if record.parameters != parameters {
            return Err(taken().into());
        }
        let volume_context = context(&create.attributes, &record, volumes.as_ref());
        tracing::info!(id = record.id, source = %create.attributes.source, "volume created");
        Ok(Some(Volume { capacity_bytes: 0, volume_id: record.id, volume_context, ..Volume::default() }))
    }

    /// Makes sure of the archive; the record that shall be written.
    async fn provision(
        &self,
        create: &Create,
        parameters: Digest,
        volumes: &dyn Volumes,
        cancel: &CancellationToken,
    ) -> Result<VolumeRecord, Status> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
        let record = VolumeRecord {
            id: create.id.clone(),
            name: create.name.clone(),
            parameters,
            image: None,
            manifest_digest: None,
            archive: None,
            created,
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
            version: self.version(image, create.attributes.clip_version),
            pull_policy: create.attributes.pull_policy,
            credentials: create.credentials.clone(),
        };
        let provided = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(aborted("the creation was given up: the controller is stopping")),
            provided = self.images.provide(&request) => provided?,
        };
        let version = version_of(&provided.location, &provided.manifest_digest, &platform);
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
            ..record
        })
    }

    /// A v2 index of a layout could be mounted on this machine only: v1 is built of it.
    fn version(&self, image: &ImageRef, attribute: Option<Version>) -> Version {
        let (version, because) = self.default_version.resolve(attribute);
        if version == Version::V2 && !matches!(image, ImageRef::Registry { .. }) {
            metrics().build_fallbacks.inc();
            tracing::warn!(%image, "a v2 index of a layout would be of no use to other machines: building v1");
            return Version::V1;
        }
        tracing::debug!(?version, because, "version to build where no archive is found");
        version
    }
}

/// What was made: after a fallback not what was asked for. The file's name tells.
fn version_of(location: &Location, manifest: &Digest, platform: &Platform) -> Version {
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
            let platform = attributes.platform.clone().unwrap_or_else(Platform::host);
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
        let create = Create::parse(request.into_inner())?;
        note(&create.id, "");
        self.volumes()?;
        let identity = create.credentials.identity.map(|identity| identity.hex());
        let fingerprint = serde_json::json!([create.attributes.given, identity]).to_string();
        let (id, source) = (create.id.clone(), create.attributes.source.clone());
        let call = Call {
            key: &id,
            kind: "create",
            fingerprint: Digest::of(fingerprint.as_bytes()),
            deadline,
            what: format!("making a volume of {source}"),
            progress: &|| progress(self.images.as_ref(), &source),
            preempts: None,
        };
        let volume = self.operations.run(call, |cancel| self.clone().create(create, cancel)).await?;
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
            let parameters = parameters_digest(&Attributes::parse(&request.parameters)?.given);
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
