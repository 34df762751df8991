//! Is this plugin being restarted, or is the driver being uninstalled?
//!
//! SIGTERM is the same in both cases. What differs is the DaemonSet that runs the plugin: it is there in a restart, an
//! upgrade, a drain and a reboot, and gone (or going) in the end. Then the rights of the plugin may have gone with it, so
//! being refused where it was allowed before says the same. No answer says nothing: the plugin stays registered.

use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{Api, Client};

/// How long the API server may take; the pod's grace period goes on meanwhile.
const PATIENCE: Duration = Duration::from_secs(4);

/// The DaemonSet of this plugin.
#[derive(Debug, Clone)]
pub struct Release {
    api: Api<DaemonSet>,
    name: String,
    readable: bool,
}

/// Why a DaemonSet can't be asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// Not `namespace/name`.
    #[error("{0:?} names no DaemonSet; write NAMESPACE/NAME")]
    Name(String),
    /// There is no API server to be asked.
    #[error("the API server can't be asked: {0}; this is for pods with a ServiceAccount")]
    NoApi(String),
}

impl Release {
    /// `daemon_set`: `namespace/name`. Asks once, to learn what a later answer means.
    pub async fn find(daemon_set: &str) -> Result<Self, ReleaseError> {
        let no_api = |e: &dyn std::fmt::Display| ReleaseError::NoApi(e.to_string());
        let config = kube::Config::incluster().map_err(|e| no_api(&e))?;
        let client = Client::try_from(config).map_err(|e| no_api(&e))?;
        Self::with_client(client, daemon_set).await
    }

    async fn with_client(client: Client, daemon_set: &str) -> Result<Self, ReleaseError> {
        let parts = daemon_set.split_once('/').filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty());
        let Some((namespace, name)) = parts else { return Err(ReleaseError::Name(daemon_set.to_owned())) };
        let mut release = Self { api: Api::namespaced(client, namespace), name: name.to_owned(), readable: false };
        match release.get().await {
            Some(Ok(_)) => release.readable = true,
            Some(Err(error)) => {
                tracing::warn!(
                    daemon_set,
                    "the DaemonSet of this plugin can't be read, so uninstalling leaves the kubelet's registration behind: {error}"
                );
            }
            None => tracing::warn!(daemon_set, "the API server does not answer"),
        }
        Ok(release)
    }

    /// `None`: no answer in time.
    async fn get(&self) -> Option<Result<DaemonSet, kube::Error>> {
        tokio::time::timeout(PATIENCE, self.api.get(&self.name)).await.ok()
    }

    /// True only where the API server's answer means that the DaemonSet is gone or going.
    pub async fn is_ending(&self) -> bool {
        match self.get().await {
            Some(Ok(found)) => found.metadata.deletion_timestamp.is_some(),
            Some(Err(kube::Error::Api(status))) => match status.code {
                404 => true,
                401 | 403 => self.readable,
                _ => false,
            },
            Some(Err(_)) | None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use kube::client::Body;

    use super::*;

    /// An API server that gives these answers, one after the other.
    fn server(answers: &[(u16, serde_json::Value)]) -> Client {
        let answers = Arc::new(Mutex::new(answers.to_vec()));
        let service = tower::service_fn(move |request: http::Request<Body>| {
            assert_eq!(request.uri().path(), "/apis/apps/v1/namespaces/storage/daemonsets/clip-csi-node");
            let (code, body) = answers.lock().unwrap().remove(0);
            let answer = http::Response::builder().status(code).body(Body::from(body.to_string().into_bytes()));
            async move { Ok::<_, Infallible>(answer.unwrap()) }
        });
        Client::new(service, "default")
    }

    fn there(metadata: serde_json::Value) -> (u16, serde_json::Value) {
        (200, serde_json::json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata }))
    }

    fn refused(code: u16) -> (u16, serde_json::Value) {
        let body = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "no", "reason": "No", "code": code
        });
        (code, body)
    }

    async fn ending(at_start: (u16, serde_json::Value), at_the_end: (u16, serde_json::Value)) -> bool {
        let client = server(&[at_start, at_the_end]);
        Release::with_client(client, "storage/clip-csi-node").await.unwrap().is_ending().await
    }

    #[tokio::test]
    async fn a_restart_keeps_the_registration_and_an_uninstall_ends_it() {
        let alive = || there(serde_json::json!({ "name": "clip-csi-node" }));
        let going = there(serde_json::json!({ "name": "clip-csi-node", "deletionTimestamp": "2026-01-01T00:00:00Z" }));
        assert!(!ending(alive(), alive()).await);
        assert!(ending(alive(), going).await, "being deleted in the foreground");
        assert!(ending(alive(), refused(404)).await, "deleted");
        assert!(ending(alive(), refused(401)).await, "the ServiceAccount went first");
        assert!(ending(alive(), refused(403)).await, "the rights went first");
    }

    #[tokio::test]
    async fn an_answer_that_does_not_tell_keeps_the_registration() {
        let alive = there(serde_json::json!({ "name": "clip-csi-node" }));
        assert!(!ending(alive, refused(503)).await);
        assert!(!ending(refused(403), refused(403)).await, "never was allowed to ask");
    }

    #[tokio::test]
    async fn a_name_without_namespace_is_refused_with_the_shape_that_is_wanted() {
        for bad in ["clip-csi-node", "/x", "x/"] {
            let error = Release::with_client(server(&[]), bad).await.unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("NAMESPACE/NAME"), "{error}");
        }
    }
}
