//! The startup taint: an administrator puts it on new nodes, so that no pod that needs the driver lands there before the
//! kubelet knows the driver. Once CSINode lists it, the taint goes.

use std::sync::Arc;
use std::time::Duration;

use super::{KubeApi, KubeError};
use crate::metrics::metrics;

/// The first pause between two looks at CSINode; registration takes a second.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest: a driver that is not registered by then has another problem.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Looks after which the log says what is being waited for.
const PATIENCE: u32 = 10;

/// Removes the taint from the own node.
#[derive(Debug, Clone)]
pub struct StartupTaint {
    /// The API.
    pub api: Arc<dyn KubeApi>,
    /// The own node.
    pub node: String,
    /// The driver's name, as CSINode lists it.
    pub driver: String,
    /// The taint's key; whatever its value and effect.
    pub key: String,
}

impl StartupTaint {
    /// Waits until CSINode lists the driver, then removes the taint; tries until it is gone, since rights that are
    /// missing now may be given later. To be dropped at shutdown.
    pub async fn remove(&self) {
        self.remove_pausing(FIRST_PAUSE, LONGEST_PAUSE).await;
    }

    pub(super) async fn remove_pausing(&self, first: Duration, longest: Duration) {
        let mut pause = first;
        for tries in 1_u32.. {
            match self.try_once().await {
                Ok(Some(removed)) => {
                    metrics().startup_taint.with_label_values(&[if removed > 0 { "removed" } else { "absent" }]).inc();
                    if removed > 0 {
                        tracing::info!(node = self.node, taint = self.key, "startup taint removed");
                    }
                    return;
                }
                Ok(None) if tries % PATIENCE == 0 => {
                    tracing::warn!(node = self.node, driver = self.driver, "the kubelet does not list the driver yet");
                }
                Ok(None) => {}
                Err(KubeError::Conflict { .. }) => {
                    // Somebody else changed the node: read it again, at once.
                    tracing::debug!(node = self.node, "the node changed while its taint was being removed");
                    pause = first;
                }
                Err(error) => {
                    metrics().startup_taint.with_label_values(&["error"]).inc();
                    tracing::warn!(node = self.node, taint = self.key, "startup taint can't be removed yet: {error}");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// One try: how many taints of that key were removed; `None`: the driver is not listed yet.
    async fn try_once(&self) -> Result<Option<usize>, KubeError> {
        if !self.api.node_drivers(&self.node).await?.contains(&self.driver) {
            return Ok(None);
        }
        let mut taints = self.api.taints(&self.node).await?;
        let before = taints.taints.len();
        taints.taints.retain(|taint| taint.get("key").and_then(|key| key.as_str()) != Some(self.key.as_str()));
        let removed = before - taints.taints.len();
        if removed > 0 {
            self.api.set_taints(&self.node, &taints).await?;
        }
        Ok(Some(removed))
    }
}
