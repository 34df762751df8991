//! A cluster as its administrator and its kubelets see it, and the driver's two ways into it.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use clip_csi::k8s::events::Event;
use clip_csi::k8s::fake::FakeKube;
use clip_csi::k8s::{Claim, KubeApi, Object};
use serde_json::Value;

/// The fake, or a real one. It is made for one test, and what it holds goes with it.
#[async_trait]
pub trait Cluster: Sync {
    /// The API as the node plugin of [`Self::node_name`] has it.
    fn node(&self) -> Arc<dyn KubeApi>;
    /// The API as the controller has it.
    fn controller(&self) -> Arc<dyn KubeApi>;
    /// The driver's namespace.
    fn namespace(&self) -> &str;
    /// A node that no kubelet runs on.
    fn node_name(&self) -> &str;
    /// A name, made this test's own.
    fn unique(&self, name: &str) -> String;
    /// Makes a StorageClass.
    async fn put_class(&self, name: &str, parameters: &BTreeMap<String, String>);
    /// Makes a claim for ReadOnlyMany in the driver's namespace; its uid.
    async fn put_claim(&self, name: &str, class: &str, annotations: &BTreeMap<String, String>) -> String;
    /// Replaces the node's taints, as its administrator.
    async fn put_taints(&self, taints: &[Value]);
    /// The node's kubelet lists the driver in CSINode, beside those before.
    async fn register(&self, driver: &str);
    /// Events about an object of this name, once there are some.
    async fn events_of(&self, name: &str) -> Vec<Value>;
}

/// The fake.
#[derive(Debug, Default)]
pub struct Fake(Arc<FakeKube>);

#[async_trait]
impl Cluster for Fake {
    fn node(&self) -> Arc<dyn KubeApi> {
        self.0.clone()
    }
    fn controller(&self) -> Arc<dyn KubeApi> {
        self.0.clone()
    }
    fn namespace(&self) -> &str {
        "team"
    }
    fn node_name(&self) -> &str {
        "node-1"
    }
    fn unique(&self, name: &str) -> String {
        name.to_owned()
    }
    async fn put_class(&self, name: &str, parameters: &BTreeMap<String, String>) {
        self.0.put_class(name, parameters.clone());
    }
    async fn put_claim(&self, name: &str, class: &str, annotations: &BTreeMap<String, String>) -> String {
        let uid = format!("uid-of-{name}");
        let claim = Claim {
            uid: uid.clone(),
            annotations: annotations.clone(),
            storage_class: Some(class.to_owned()),
            access_modes: vec!["ReadOnlyMany".into()],
        };
        self.0.put_claim(self.namespace(), name, claim);
        uid
    }
    async fn put_taints(&self, taints: &[Value]) {
        self.0.put_taints(self.node_name(), taints);
    }
    async fn register(&self, driver: &str) {
        self.0.register(self.node_name(), driver);
    }
    async fn events_of(&self, name: &str) -> Vec<Value> {
        let about = |object: &Object| object.name == name;
        self.0.until(|kube| kube.events().iter().any(|event| about(&event.object))).await;
        self.0.events().iter().filter(|event| about(&event.object)).map(Event::to_json).collect()
    }
}
