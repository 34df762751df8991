//! A Kubernetes API in memory that fails on request, for tests.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::events::Event;
use super::{Claim, ConfigMap, KubeApi, KubeError, Taints};

#[derive(Debug, Default)]
struct State {
    claims: HashMap<(String, String), Claim>,
    classes: HashMap<String, BTreeMap<String, String>>,
    drivers: HashMap<String, Vec<String>>,
    nodes: HashMap<String, (u64, Vec<Value>)>,
    config_maps: BTreeMap<String, ConfigMap>,
    events: Vec<Event>,
    calls: Vec<&'static str>,
    faults: HashMap<&'static str, VecDeque<KubeError>>,
    racing: Option<(String, Value)>,
}

/// Empty at first.
#[derive(Debug)]
pub struct FakeKube {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    open: watch::Sender<bool>,
}

impl Default for FakeKube {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(0), open: watch::Sender::new(true) }
    }
}

impl FakeKube {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits at the gate, counts the call, and fails it where a fault is set.
    async fn enter(&self, verb: &'static str) -> Result<MutexGuard<'_, State>, KubeError> {
        // A sender of this very value can't be gone.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        let mut state = self.state();
        state.calls.push(verb);
        let fault = state.faults.get_mut(verb).and_then(VecDeque::pop_front);
        self.changed.send_modify(|count| *count += 1);
        fault.map_or(Ok(state), Err)
    }

    /// The next call of this verb (a method's name) fails so; more faults queue up.
    pub fn fail(&self, verb: &'static str, error: KubeError) {
        self.state().faults.entry(verb).or_default().push_back(error);
    }

    /// Closed: no call is answered until it is opened.
    pub fn gate(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// How often a verb was called.
    pub fn calls(&self, verb: &str) -> usize {
        self.state().calls.iter().filter(|call| **call == verb).count()
    }

    /// Puts a claim there.
    pub fn put_claim(&self, namespace: &str, name: &str, claim: Claim) {
        self.state().claims.insert((namespace.to_owned(), name.to_owned()), claim);
    }

    /// Puts a StorageClass there.
    pub fn put_class(&self, name: &str, parameters: BTreeMap<String, String>) {
        self.state().classes.insert(name.to_owned(), parameters);
    }

    /// The kubelet of a node registers a driver.
    pub fn register(&self, node: &str, driver: &str) {
        self.state().drivers.entry(node.to_owned()).or_default().push(driver.to_owned());
    }

    /// Adds a taint to a node, as anybody else would: its version changes.
    pub fn taint(&self, node: &str, key: &str, effect: &str) {
        self.state().taint(node, json!({ "key": key, "effect": effect }));
    }

    /// Replaces a node's taints, as its administrator would: its version changes.
    pub fn put_taints(&self, node: &str, taints: &[Value]) {
        let mut state = self.state();
        let (version, there) = state.nodes.entry(node.to_owned()).or_default();
        *version += 1;
        *there = taints.to_vec();
    }

    /// Adds this taint just before the next [`KubeApi::set_taints`] is done.
    pub fn race_taint(&self, node: &str, key: &str, effect: &str) {
        self.state().racing = Some((node.to_owned(), json!({ "key": key, "effect": effect })));
    }

    /// The keys of a node's taints.
    pub fn taint_keys(&self, node: &str) -> Vec<String> {
        let state = self.state();
        let taints = state.nodes.get(node).map(|(_, taints)| taints.as_slice()).unwrap_or_default();
        taints.iter().filter_map(|taint| Some(taint.get("key")?.as_str()?.to_owned())).collect()
    }

    /// All Events so far.
    pub fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    /// Ready once `condition` holds; looked at after each call.
    pub async fn until(&self, condition: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !condition(self) {
            // A sender of this very value can't be gone.
            let _ = changed.changed().await;
        }
    }
}

impl State {
    fn taint(&mut self, node: &str, taint: Value) {
        let (version, taints) = self.nodes.entry(node.to_owned()).or_default();
        *version += 1;
        taints.push(taint);
    }
}

#[async_trait]
impl KubeApi for FakeKube {
    async fn reachable(&self) -> Result<(), KubeError> {
        self.enter("reachable").await.map(drop)
    }

    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<Claim>, KubeError> {
        Ok(self.enter("claim").await?.claims.get(&(namespace.to_owned(), name.to_owned())).cloned())
    }

    async fn class_parameters(&self, name: &str) -> Result<Option<BTreeMap<String, String>>, KubeError> {
        Ok(self.enter("class_parameters").await?.classes.get(name).cloned())
    }

    async fn node_drivers(&self, node: &str) -> Result<Vec<String>, KubeError> {
        Ok(self.enter("node_drivers").await?.drivers.get(node).cloned().unwrap_or_default())
    }

    async fn taints(&self, node: &str) -> Result<Taints, KubeError> {
        let state = self.enter("taints").await?;
        let what = format!("get node {node}");
        let (version, taints) = state.nodes.get(node).ok_or(KubeError::NotFound { what })?;
        Ok(Taints { resource_version: version.to_string(), taints: taints.clone() })
    }

    async fn set_taints(&self, node: &str, wanted: &Taints) -> Result<(), KubeError> {
        let mut state = self.enter("set_taints").await?;
        if let Some((node, taint)) = state.racing.take() {
            state.taint(&node, taint);
        }
        let what = format!("patch node {node}");
        let Some((version, taints)) = state.nodes.get_mut(node) else { return Err(KubeError::NotFound { what }) };
        if version.to_string() != wanted.resource_version {
            return Err(KubeError::Conflict { what });
        }
        *version += 1;
        taints.clone_from(&wanted.taints);
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn create_config_map(&self, map: &ConfigMap) -> Result<bool, KubeError> {
        let mut state = self.enter("create_config_map").await?;
        if state.config_maps.contains_key(&map.name) {
            return Ok(false);
        }
        state.config_maps.insert(map.name.clone(), map.clone());
        Ok(true)
    }

    async fn config_map(&self, name: &str) -> Result<Option<ConfigMap>, KubeError> {
        Ok(self.enter("config_map").await?.config_maps.get(name).cloned())
    }

    async fn config_maps(&self, label: &str, value: &str) -> Result<Vec<ConfigMap>, KubeError> {
        let state = self.enter("config_maps").await?;
        let labelled = |map: &&ConfigMap| map.labels.get(label).is_some_and(|v| v == value);
        Ok(state.config_maps.values().filter(labelled).cloned().collect())
    }

    async fn delete_config_map(&self, name: &str) -> Result<(), KubeError> {
        self.enter("delete_config_map").await?.config_maps.remove(name);
        Ok(())
    }

    async fn create_event(&self, event: &Event) -> Result<(), KubeError> {
        let mut state = self.enter("create_event").await?;
        state.events.push(event.clone());
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }
}
