//! The generated code of proto/, all of it, and the `Debug` of what must not be printed.

/// CSI 1.12.
#[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// The kubelet's plugin registration.
#[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)]
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

/// The compiled descriptors of proto/ and what it imports: an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// `Debug` for messages with secrets: the named fields only. Volume contexts are left out too, they may hold tokens.
macro_rules! redacted {
    ($( $message:ident { $($field:ident),* } )+) => { $(
        impl std::fmt::Debug for v1::$message {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($message))$( .field(stringify!($field), &self.$field) )*.finish_non_exhaustive()
            }
        }
    )+ };
}

redacted! {
    CreateVolumeRequest { name, capacity_range, volume_capabilities, parameters }
    DeleteVolumeRequest { volume_id }
    ControllerPublishVolumeRequest { volume_id, node_id }
    ControllerUnpublishVolumeRequest { volume_id, node_id }
    ValidateVolumeCapabilitiesRequest { volume_id, volume_capabilities, parameters }
    ControllerModifyVolumeRequest { volume_id }
    CreateSnapshotRequest { source_volume_id, name }
    DeleteSnapshotRequest { snapshot_id }
    ListSnapshotsRequest { source_volume_id, snapshot_id }
    GetSnapshotRequest { snapshot_id }
    ControllerExpandVolumeRequest { volume_id, capacity_range }
    NodeStageVolumeRequest { volume_id, staging_target_path }
    NodePublishVolumeRequest { volume_id, target_path, volume_capability, readonly }
    NodeExpandVolumeRequest { volume_id, volume_path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_never_prints_secrets_or_tokens() {
        let secret = || std::collections::HashMap::from([("k".to_owned(), "hunter2".to_owned())]);
        let publish = v1::NodePublishVolumeRequest {
            volume_id: "vol".into(),
            secrets: secret(),
            volume_context: secret(),
            ..Default::default()
        };
        let create = v1::CreateVolumeRequest { name: "vol".into(), secrets: secret(), ..Default::default() };
        let text = format!("{publish:?} {create:?}");
        assert!(text.contains("vol") && !text.contains("hunter2"), "{text}");
    }
}
