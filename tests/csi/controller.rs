use clip_csi::archive::Version;
use clip_csi::csi::proto::v1::controller_service_capability::{Type, rpc};
use clip_csi::csi::proto::v1::volume_capability::access_mode::Mode;
use clip_csi::csi::proto::v1::volume_content_source::{self, VolumeSource};
use clip_csi::csi::proto::v1::{
    CapacityRange, ControllerGetCapabilitiesRequest, CreateVolumeRequest, DeleteVolumeRequest,
    GetPluginCapabilitiesRequest, ListVolumesRequest, ProbeRequest, ValidateVolumeCapabilitiesRequest, Volume,
    VolumeContentSource,
};
use clip_csi::csi::volume_context::{AskedFor, Attributes};
use clip_csi::units::Platform;
use tonic::Code;

use super::fakes::MANIFEST;
use super::{Server, map, mount_capability};

const IMAGE: (&str, &str) = ("image", "registry.example/team/app:1");

fn create(name: &str, parameters: &[(&str, &str)]) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        parameters: map(parameters),
        volume_capabilities: vec![mount_capability(Mode::MultiNodeReaderOnly)],
        capacity_range: Some(CapacityRange { required_bytes: 10 << 30, limit_bytes: 0 }),
        ..Default::default()
    }
}

async fn created(server: &Server, request: CreateVolumeRequest) -> Volume {
    server.controller_client().await.create_volume(request).await.unwrap().into_inner().volume.unwrap()
}

#[tokio::test]
async fn a_controller_says_what_it_serves() {
    let server = Server::controller(true).await;
    let mut identity = server.identity_client().await;
    assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    let can = identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(can.capabilities.len(), 1);
    let mut controller = server.controller_client().await;
    let can = controller.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap().into_inner();
    let types: Vec<i32> = can
        .capabilities
        .iter()
        .map(|c| match c.r#type.as_ref().unwrap() {
            Type::Rpc(rpc) => rpc.r#type,
        })
        .collect();
    assert_eq!(types, [rpc::Type::CreateDeleteVolume as i32]);
    let list = controller.list_volumes(ListVolumesRequest::default()).await.unwrap_err();
    assert_eq!(list.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_volume_is_pinned_stored_recorded_and_understood_by_the_node() {
    let server = Server::controller(true).await;
    let pvc = ("csi.storage.k8s.io/pvc/name", "claim");
    let volume = created(&server, create("pvc-1", &[IMAGE, ("subPath", "usr"), pvc])).await;
    assert_eq!(volume.capacity_bytes, 0, "unknown: the provisioner deletes a volume that reports less than was asked");
    let digits = volume.volume_id.strip_prefix("v1-").unwrap();
    assert!(digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit()), "{}", volume.volume_id);

    let attributes = Attributes::parse(&volume.volume_context, AskedFor::Pod).unwrap();
    assert_eq!(volume.volume_context["image"], format!("registry.example/team/app@{MANIFEST}"));
    assert_eq!((attributes.clip_version, attributes.platform), (Some(Version::V2), Some(Platform::host())));
    assert_eq!(attributes.sub_path.as_deref(), Some("usr"));

    let record = server.volumes.records.lock().unwrap()[&volume.volume_id].clone();
    assert_eq!((record.name.as_str(), record.manifest_digest), ("pvc-1", Some(MANIFEST)));
    let stored = server.volumes.stored.lock().unwrap().clone();
    assert_eq!(stored, [record.archive.unwrap()]);
    assert!(stored[0].starts_with("archives/") && stored[0].ends_with("-v2.clip"), "{stored:?}");
}

#[tokio::test]
async fn a_volume_that_a_controller_on_another_machine_recorded_keeps_its_platform() {
    let server = Server::controller(true).await;
    let first = created(&server, create("pvc-1", &[IMAGE])).await;
    let (here, other) = (Platform::host().to_string().replace('/', "-"), "linux-riscv64");
    if let Some(record) = server.volumes.records.lock().unwrap().get_mut(&first.volume_id) {
        record.archive = record.archive.as_ref().map(|archive| archive.replace(&here, other));
    }
    let again = created(&server, create("pvc-1", &[IMAGE])).await;
    assert_eq!(again.volume_context["platform"], "linux/riscv64");
}

#[tokio::test]
async fn the_same_name_is_the_same_volume_and_other_parameters_are_refused() {
    let server = Server::controller(true).await;
    let first = created(&server, create("pvc-1", &[IMAGE])).await;
    let again = created(&server, create("pvc-1", &[IMAGE, ("csi.storage.k8s.io/pvc/name", "claim")])).await;
    assert_eq!((first.clone(), server.images.asked()), (again, 1));
    assert_ne!(first.volume_id, created(&server, create("pvc-2", &[IMAGE])).await.volume_id);
    let other = create("pvc-1", &[("image", "registry.example/other:1")]);
    let status = server.controller_client().await.create_volume(other).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(server.images.asked(), 2, "nothing is built for a name that is taken");
}

#[tokio::test]
async fn creation_outlasts_its_callers_deadline_and_the_retry_joins_it() {
    let server = Server::controller(true).await;
    server.images.building.close();
    let status = server.controller_client().await.create_volume(create("pvc-1", &[IMAGE])).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("34 %"), "{}", status.message());
    let delete = DeleteVolumeRequest { volume_id: "v1-".to_owned(), ..Default::default() };
    server.controller_client().await.delete_volume(delete).await.unwrap();
    server.images.building.open();
    created(&server, create("pvc-1", &[IMAGE])).await;
    assert_eq!(server.images.asked(), 1);
}

#[tokio::test]
async fn an_image_of_a_layout_becomes_a_v1_archive_of_the_store() {
    let server = Server::controller(true).await;
    let volume = created(&server, create("pvc-1", &[("image", "oci:/images/app:1"), ("clipVersion", "2")])).await;
    assert_eq!(server.images.requests.lock().unwrap()[0].version, Version::V1, "other machines can't read the layout");
    let archive = &volume.volume_context["archive"];
    assert!(archive.starts_with("s3://store/archives/") && archive.ends_with("-v1.clip"), "{archive}");
    assert!(!volume.volume_context.contains_key("image"));
    Attributes::parse(&volume.volume_context, AskedFor::Pod).unwrap();
}

#[tokio::test]
async fn an_archive_is_passed_on_and_nothing_is_built() {
    let server = Server::controller(true).await;
    let volume = created(&server, create("pvc-1", &[("archive", "s3://bucket/a.clip")])).await;
    assert_eq!(volume.volume_context, map(&[("archive", "s3://bucket/a.clip")]));
    assert_eq!(server.images.asked(), 0);
}

#[tokio::test]
async fn what_can_not_be_provisioned_says_why() {
    let server = Server::controller(true).await;
    let clone = VolumeContentSource { r#type: Some(volume_content_source::Type::Volume(VolumeSource::default())) };
    let good = || create("pvc-1", &[IMAGE]);
    let bad = [
        (create("", &[IMAGE]), "name is missing"),
        (create(&"x".repeat(129), &[IMAGE]), "129 bytes"),
        (create("pvc-1", &[]), "names nothing to mount"),
        (create("pvc-1", &[IMAGE, ("fsType", "ext4")]), "fsType"),
        (CreateVolumeRequest { volume_capabilities: vec![], ..good() }, "volume_capabilities is missing"),
        (CreateVolumeRequest { volume_content_source: Some(clone), ..good() }, "neither cloned nor restored"),
        (CreateVolumeRequest { mutable_parameters: map(&[("a", "b")]), ..good() }, "VolumeAttributesClass"),
        (
            CreateVolumeRequest { volume_capabilities: vec![mount_capability(Mode::MultiNodeMultiWriter)], ..good() },
            "ReadOnlyMany",
        ),
    ];
    let mut client = server.controller_client().await;
    for (request, words) in bad {
        let status = client.create_volume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(words), "{}", status.message());
    }
    assert!(server.volumes.records.lock().unwrap().is_empty());
    created(&server, create(&"x".repeat(128), &[IMAGE])).await;
}

#[tokio::test]
async fn deletion_is_idempotent_and_forgets_the_record_only() {
    let server = Server::controller(true).await;
    let volume = created(&server, create("pvc-1", &[IMAGE])).await;
    let mut client = server.controller_client().await;
    for volume_id in [volume.volume_id.as_str(), &volume.volume_id, "no-id-of-ours"] {
        let request = DeleteVolumeRequest { volume_id: volume_id.into(), ..Default::default() };
        client.delete_volume(request).await.unwrap();
    }
    assert!(server.volumes.records.lock().unwrap().is_empty());
    assert_eq!(server.volumes.stored.lock().unwrap().len(), 1);
    let nameless = client.delete_volume(DeleteVolumeRequest::default()).await.unwrap_err();
    assert_eq!(nameless.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn capabilities_are_confirmed_denied_with_the_reason_or_the_volume_is_not_found() {
    let server = Server::controller(true).await;
    let volume = created(&server, create("pvc-1", &[IMAGE])).await;
    let mut client = server.controller_client().await;
    let ask = |mode: Mode| ValidateVolumeCapabilitiesRequest {
        volume_id: volume.volume_id.clone(),
        volume_context: volume.volume_context.clone(),
        volume_capabilities: vec![mount_capability(mode)],
        parameters: map(&[IMAGE]),
        ..Default::default()
    };
    let yes = client.validate_volume_capabilities(ask(Mode::SingleNodeWriter)).await.unwrap().into_inner();
    assert_eq!(yes.confirmed.unwrap().volume_capabilities.len(), 1);
    let no = client.validate_volume_capabilities(ask(Mode::MultiNodeMultiWriter)).await.unwrap().into_inner();
    assert!(no.confirmed.is_none() && no.message.contains("ReadOnlyMany"), "{}", no.message);
    let other =
        ValidateVolumeCapabilitiesRequest { parameters: map(&[("image", "other")]), ..ask(Mode::SingleNodeWriter) };
    assert!(client.validate_volume_capabilities(other).await.unwrap().into_inner().confirmed.is_none());
    let unknown = ValidateVolumeCapabilitiesRequest { volume_id: "x".into(), ..ask(Mode::SingleNodeWriter) };
    assert_eq!(client.validate_volume_capabilities(unknown).await.unwrap_err().code(), Code::NotFound);
    let none = ValidateVolumeCapabilitiesRequest { volume_capabilities: vec![], ..ask(Mode::SingleNodeWriter) };
    assert_eq!(client.validate_volume_capabilities(none).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn without_a_store_nothing_is_provisioned_and_the_remedy_named() {
    let server = Server::controller(false).await;
    let status = server.controller_client().await.create_volume(create("pvc-1", &[IMAGE])).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("imageService.archiveStore"), "{}", status.message());
    assert_eq!(server.images.asked(), 0);
}
