//! The API server, through `kube`. Objects are read as JSON and only what is needed is taken from them: a field that a
//! newer server adds neither breaks nor gets lost.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::core::params::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, Config};
use serde_json::{Value, json};

use super::config::{Enabled, KubeConfig};
use super::events::Event;
use super::{Claim, ConfigMap, KubeApi, KubeError, Taints};
use crate::metrics::metrics;
use crate::source::tls;

/// How long one call may take, its retries included. A CreateVolume has minutes, a probe 5 s of its own.
const DEADLINE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);
/// Objects in one answer to a list.
const PAGE: u32 = 500;
/// Most objects of one list: as many volumes as a large cluster has, bounded all the same.
const MAX_LISTED: usize = 100_000;
/// Where a pod finds its service account.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// The API server. Connects with the first call.
struct Server {
    client: Client,
    namespace: String,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// The API that the configuration names: `None` where it is off, or `auto` finds nothing to connect with, which is logged.
/// Reads files, and connects with the first call only.
pub async fn connect(config: &KubeConfig) -> Result<Option<Arc<dyn KubeApi>>, KubeError> {
    let found = match config.enabled {
        Enabled::No => return Ok(None),
        Enabled::Auto if config.kubeconfig.is_none() && !in_cluster() => {
            tracing::info!("no Kubernetes API here (k8s.enabled: auto): no Events, no taint is removed");
            return Ok(None);
        }
        Enabled::Auto | Enabled::Yes => server(config).await,
    };
    match found {
        Ok(server) => Ok(Some(Arc::new(server))),
        Err(error) if config.enabled == Enabled::Auto && config.kubeconfig.is_none() => {
            tracing::warn!("{error}: going on without the Kubernetes API (k8s.enabled: auto)");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn in_cluster() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty()) && Path::new(TOKEN).exists()
}

async fn server(config: &KubeConfig) -> Result<Server, KubeError> {
    let bad = |key, detail: String| KubeError::Config { key, detail };
    let mut settings = match &config.kubeconfig {
        Some(path) => {
            let unusable =
                |error: kube::config::KubeconfigError| bad("kubeconfig", format!("{}: {error}", path.display()));
            let file = Kubeconfig::read_from(path).map_err(unusable)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(unusable)?
        }
        None => Config::incluster().map_err(|error| {
            bad("enabled", format!("no service account can be used here ({error}); set k8s.kubeconfig, or false"))
        })?,
    };
    settings.connect_timeout = Some(CONNECT);
    if settings.root_cert.is_none() && !settings.accept_invalid_certs && !tls::has_roots() {
        // A service account has the cluster's own authority beside it; a kubeconfig may have none.
        if settings.cluster_url.scheme_str() == Some("https") {
            let detail = format!("it names no certificate-authority, and {}", tls::NO_ROOTS);
            return Err(bad("kubeconfig", detail));
        }
        settings.root_cert = Some(Vec::new());
    }
    let namespace = config.namespace.clone().unwrap_or_else(|| settings.default_namespace.clone());
    let client = Client::try_from(settings).map_err(|error| bad("enabled", chain(&error)))?;
    Ok(Server { client, namespace })
}

/// An error with its causes: the outermost says only that a service failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}

fn classify(what: &str, error: &kube::Error) -> KubeError {
    let what = what.to_owned();
    match error {
        kube::Error::Api(status) => {
            let detail: String =
                status.message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect();
            match status.code {
                404 => KubeError::NotFound { what },
                401 | 403 => KubeError::Denied { what, detail },
                409 => KubeError::Conflict { what },
                408 | 429 | 500.. => KubeError::Unavailable { what, detail },
                _ => KubeError::Invalid { what, detail },
            }
        }
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => {
            KubeError::Invalid { what, detail: "the answer is no JSON object".into() }
        }
        kube::Error::BuildRequest(error) => KubeError::Invalid { what, detail: chain(error) },
        other => KubeError::Unavailable { what, detail: chain(other) },
    }
}

/// One thing or, for a 404, nothing.
fn absent<T>(answer: Result<T, KubeError>) -> Result<Option<T>, KubeError> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(KubeError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn texts(value: &Value, pointer: &str) -> BTreeMap<String, String> {
    let pairs = value.pointer(pointer).and_then(Value::as_object).into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn config_map(value: &Value) -> ConfigMap {
    ConfigMap {
        name: text(value, "/metadata/name"),
        labels: texts(value, "/metadata/labels"),
        data: texts(value, "/data"),
    }
}

type Built = Result<http::Request<Vec<u8>>, kube::core::request::Error>;

impl Server {
    /// One call, within [`DEADLINE`]; failures are counted, but for a 404, which is an answer.
    async fn call(&self, what: &str, request: Built) -> Result<Value, KubeError> {
        let answer = async {
            let request = request.map_err(kube::Error::BuildRequest)?;
            self.client.request::<Value>(request).await
        };
        let outcome = match tokio::time::timeout(DEADLINE, answer).await {
            Ok(answer) => answer.map_err(|error| classify(what, &error)),
            Err(_) => {
                let detail = format!("no answer within {} s", DEADLINE.as_secs());
                Err(KubeError::Unavailable { what: what.to_owned(), detail })
            }
        };
        outcome.inspect_err(|error| {
            if !matches!(error, KubeError::NotFound { .. }) {
                metrics().kube_errors.with_label_values(&[error.kind()]).inc();
            }
        })
    }

    async fn get(&self, what: &str, path: String, name: &str) -> Result<Value, KubeError> {
        self.call(&format!("get {what} {name}"), Request::new(path).get(name, &GetParams::default())).await
    }

    fn config_maps_path(&self) -> String {
        format!("/api/v1/namespaces/{}/configmaps", self.namespace)
    }
}

/// Names go into paths: those of CSI calls come from outside.
fn plain(what: &str, name: &str) -> Result<(), KubeError> {
    let good = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if good && !name.is_empty() && name.len() <= 253 && !name.starts_with('.') {
        return Ok(());
    }
    let detail = "that is no name of a Kubernetes object".to_owned();
    Err(KubeError::Invalid { what: format!("{what} {:?}", name.chars().take(100).collect::<String>()), detail })
}

#[async_trait]
impl KubeApi for Server {
    async fn reachable(&self) -> Result<(), KubeError> {
        let request = http::Request::get("/version")
            .body(Vec::new())
            .map_err(|e| KubeError::Invalid { what: "get /version".into(), detail: e.to_string() })?;
        self.call("get /version", Ok(request)).await.map(drop)
    }

    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<Claim>, KubeError> {
        plain("namespace", namespace)?;
        plain("persistentvolumeclaim", name)?;
        let path = format!("/api/v1/namespaces/{namespace}/persistentvolumeclaims");
        let found = absent(self.get("persistentvolumeclaim", path, name).await)?;
        Ok(found.map(|claim| Claim {
            uid: text(&claim, "/metadata/uid"),
            annotations: texts(&claim, "/metadata/annotations"),
            storage_class: claim.pointer("/spec/storageClassName").and_then(Value::as_str).map(str::to_owned),
            access_modes: claim
                .pointer("/spec/accessModes")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|mode| mode.as_str().map(str::to_owned))
                .collect(),
        }))
    }

    async fn class_parameters(&self, name: &str) -> Result<Option<BTreeMap<String, String>>, KubeError> {
        plain("storageclass", name)?;
        let path = "/apis/storage.k8s.io/v1/storageclasses".to_owned();
        let found = absent(self.get("storageclass", path, name).await)?;
        Ok(found.map(|class| texts(&class, "/parameters")))
    }

    async fn node_drivers(&self, node: &str) -> Result<Vec<String>, KubeError> {
        plain("csinode", node)?;
        let found = absent(self.get("csinode", "/apis/storage.k8s.io/v1/csinodes".into(), node).await)?;
        let found = found.unwrap_or_default();
        let drivers = found.pointer("/spec/drivers").and_then(Value::as_array);
        Ok(drivers.into_iter().flatten().map(|driver| text(driver, "/name")).collect())
    }

    async fn taints(&self, node: &str) -> Result<Taints, KubeError> {
        plain("node", node)?;
        let found = self.get("node", "/api/v1/nodes".into(), node).await?;
        let taints = found.pointer("/spec/taints").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(Taints { resource_version: text(&found, "/metadata/resourceVersion"), taints })
    }

    async fn set_taints(&self, node: &str, taints: &Taints) -> Result<(), KubeError> {
        plain("node", node)?;
        // The version makes the server refuse (409) what was read before somebody else's change.
        let patch = Patch::Merge(json!({
            "metadata": { "resourceVersion": taints.resource_version },
            "spec": { "taints": taints.taints },
        }));
        let request = Request::new("/api/v1/nodes").patch(node, &PatchParams::default(), &patch);
        self.call(&format!("patch node {node}"), request).await.map(drop)
    }

    async fn create_config_map(&self, map: &ConfigMap) -> Result<bool, KubeError> {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": map.name, "labels": map.labels },
            "data": map.data,
            "immutable": true,
        });
        let body = object.to_string().into_bytes();
        let request = Request::new(self.config_maps_path()).create(&PostParams::default(), body);
        match self.call(&format!("create configmap {}/{}", self.namespace, map.name), request).await {
            Ok(_) => Ok(true),
            Err(KubeError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn config_map(&self, name: &str) -> Result<Option<ConfigMap>, KubeError> {
        plain("configmap", name)?;
        let found = absent(self.get("configmap", self.config_maps_path(), name).await)?;
        Ok(found.as_ref().map(config_map))
    }

    async fn config_maps(&self, label: &str, value: &str) -> Result<Vec<ConfigMap>, KubeError> {
        let what = format!("list configmaps in {}", self.namespace);
        let mut maps = Vec::new();
        let mut from = String::new();
        loop {
            let mut params = ListParams::default().labels(&format!("{label}={value}")).limit(PAGE);
            if !from.is_empty() {
                params = params.continue_token(&from);
            }
            let page = self.call(&what, Request::new(self.config_maps_path()).list(&params)).await?;
            let items = page.pointer("/items").and_then(Value::as_array);
            maps.extend(items.into_iter().flatten().map(config_map));
            from = text(&page, "/metadata/continue");
            if from.is_empty() {
                return Ok(maps);
            }
            if maps.len() > MAX_LISTED {
                let detail = format!("more than {MAX_LISTED} carry the label {label}={value}; use an S3 store instead");
                return Err(KubeError::Invalid { what, detail });
            }
        }
    }

    async fn delete_config_map(&self, name: &str) -> Result<(), KubeError> {
        plain("configmap", name)?;
        let request = Request::new(self.config_maps_path()).delete(name, &DeleteParams::default());
        absent(self.call(&format!("delete configmap {}/{name}", self.namespace), request).await).map(drop)
    }

    async fn create_event(&self, event: &Event) -> Result<(), KubeError> {
        let object = &event.object;
        plain("namespace", &object.namespace)?;
        let body = event.to_json().to_string().into_bytes();
        let path = format!("/api/v1/namespaces/{}/events", object.namespace);
        let request = Request::new(path).create(&PostParams::default(), body);
        self.call(&format!("create event on {} {}/{}", object.kind, object.namespace, object.name), request)
            .await
            .map(drop)
    }
}
