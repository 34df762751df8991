//! An image's config, as far as archives need it.

use std::collections::BTreeMap;

use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::BuildError;
use crate::archive::storage_info::{ImageMetadata, LayerMetadata};
use crate::source::ResolvedImage;
use crate::units::Digest;

/// The config file. Everything may be absent or null: builders differ.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ImageConfig {
    architecture: Option<String>,
    os: Option<String>,
    variant: Option<String>,
    author: Option<String>,
    created: Option<String>,
    docker_version: Option<String>,
    pub(super) config: Option<RunConfig>,
    rootfs: Option<RootFs>,
}

/// What a container of the image runs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct RunConfig {
    pub(super) env: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) user: Option<String>,
    pub(super) working_dir: Option<String>,
    pub(super) labels: Option<BTreeMap<String, String>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    stop_signal: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RootFs {
    diff_ids: Option<Vec<String>>,
}

impl ImageConfig {
    /// Reads an image's config.
    pub(super) fn parse(image: &ResolvedImage) -> Result<Self, BuildError> {
        serde_json::from_slice(&image.config)
            .map_err(|error| bad_image(image, format!("its config {} is not understood: {error}", image.config_digest)))
    }

    /// The digests of the uncompressed layers, lowest first; as many as there are layers.
    pub(super) fn diff_ids(&self, image: &ResolvedImage) -> Result<Vec<Digest>, BuildError> {
        let written = self.rootfs.as_ref().and_then(|r| r.diff_ids.as_deref()).unwrap_or_default();
        if written.len() != image.layers.len() {
            let (config, manifest) = (written.len(), image.layers.len());
            let detail = format!("its config lists {config} layers (rootfs.diff_ids), its manifest {manifest}");
            return Err(bad_image(image, detail));
        }
        let parse = |text: &String| text.parse().map_err(|error| bad_image(image, format!("rootfs.diff_ids: {error}")));
        written.iter().map(parse).collect()
    }

    /// When the image was made: seconds since the epoch and nanoseconds.
    pub(super) fn created(&self) -> Option<(i64, u32)> {
        let time = OffsetDateTime::parse(self.created.as_deref()?, &Rfc3339).ok()?;
        Some((time.unix_timestamp(), time.nanosecond()))
    }

    /// The metadata that the Go module keeps in an index.
    pub(super) fn metadata(&self, image: &ResolvedImage) -> ImageMetadata {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let run = self.config.clone().unwrap_or_default();
        ImageMetadata {
            name: image.reference.to_string(),
            digest: image.manifest_digest.to_string(),
            repo_tags: Vec::new(),
            created: self.created(),
            docker_version: text(&self.docker_version),
            labels: run.labels.unwrap_or_default(),
            architecture: text(&self.architecture),
            os: text(&self.os),
            variant: text(&self.variant),
            author: text(&self.author),
            env: run.env.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            entrypoint: run.entrypoint.unwrap_or_default(),
            user: text(&run.user),
            working_dir: text(&run.working_dir),
            exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: text(&run.stop_signal),
            layers: image.layers.iter().map(|layer| layer.digest.to_string()).collect(),
            layers_data: image
                .layers
                .iter()
                .map(|layer| LayerMetadata {
                    mime_type: layer.media_type.clone(),
                    digest: layer.digest.to_string(),
                    size: i64::try_from(layer.size).unwrap_or(i64::MAX),
                    annotations: layer.annotations.clone(),
                })
                .collect(),
        }
    }
}

/// The image contradicts the rules.
pub(super) fn bad_image(image: &ResolvedImage, detail: impl Into<String>) -> BuildError {
    BuildError::BadImage { image: image.reference.to_string(), detail: detail.into() }
}
