//! Events on pods and claims: few, never twice in a while, written in the background. An Event that can't be written is
//! counted and forgotten: no call waits for one or fails with one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;

use super::KubeApi;
use crate::metrics::metrics;

/// Events that wait to be written; more are dropped.
const QUEUE: usize = 128;
/// Time between two writes: five a second at most.
const PACE: Duration = Duration::from_millis(200);
/// One reason is told of one object once in this time. The kubelet repeats a publish every two minutes or so.
const REPEAT: Duration = Duration::from_secs(300);
/// Objects and reasons that are remembered.
const MAX_REMEMBERED: usize = 1024;
/// Longest message in bytes: the limit of the API.
const MAX_MESSAGE: usize = 1024;

/// What an Event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Object {
    /// `Pod` or `PersistentVolumeClaim`.
    pub kind: &'static str,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: `kubectl describe` finds Events by it.
    pub uid: String,
}

/// How an Event is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// For information.
    Normal,
    /// Something should be looked at.
    Warning,
}

/// One Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its own name.
    pub name: String,
    /// What it is about.
    pub object: Object,
    /// Normal or Warning.
    pub severity: Severity,
    /// A word in CamelCase.
    pub reason: &'static str,
    /// One line for people.
    pub message: String,
    /// The driver's name.
    pub component: String,
    /// The node, or the controller's pod.
    pub instance: String,
    /// When it was.
    pub at: SystemTime,
}

impl Event {
    /// The object of core/v1, which `kubectl describe` and `kubectl events` both show.
    pub fn to_json(&self) -> Value {
        let at = OffsetDateTime::from(self.at).replace_nanosecond(0).ok().and_then(|at| at.format(&Rfc3339).ok());
        let severity = match self.severity {
            Severity::Normal => "Normal",
            Severity::Warning => "Warning",
        };
        let Object { kind, namespace, name, uid } = &self.object;
        json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": self.name, "namespace": namespace },
            "involvedObject": { "apiVersion": "v1", "kind": kind, "namespace": namespace, "name": name, "uid": uid },
            "type": severity,
            "reason": self.reason,
            "message": self.message,
            "source": { "component": self.component, "host": self.instance },
            "reportingComponent": self.component,
            "reportingInstance": self.instance,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        })
    }
}

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<Event>,
    component: String,
    instance: String,
    told: Mutex<HashMap<(Object, &'static str), Instant>>,
    serial: AtomicU64,
}

/// Takes Events. Cheap to clone. The default says nothing.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Option<Arc<Inner>>);

impl Recorder {
    /// Writes what it is given, from a task of its own that ends with the last clone.
    pub fn start(api: Arc<dyn KubeApi>, component: &str, instance: &str) -> Self {
        let (queue, mut waiting) = mpsc::channel::<Event>(QUEUE);
        tokio::spawn(async move {
            while let Some(event) = waiting.recv().await {
                let result = match api.create_event(&event).await {
                    Ok(()) => "published",
                    Err(error) => {
                        tracing::debug!(reason = event.reason, "an event could not be written: {error}");
                        "failed"
                    }
                };
                metrics().events.with_label_values(&[result]).inc();
                tokio::time::sleep(PACE).await;
            }
        });
        Self(Some(Arc::new(Inner {
            queue,
            component: component.to_owned(),
            instance: instance.to_owned(),
            told: Mutex::default(),
            serial: AtomicU64::new(0),
        })))
    }

    /// Tells of `object`, unless the same reason was told of it a moment ago. Never waits. `message` is the caller's to keep
    /// free of secrets.
    pub fn tell(&self, object: &Object, severity: Severity, reason: &'static str, message: &str) {
        let Some(inner) = &self.0 else { return };
        if object.namespace.is_empty() || object.name.is_empty() || !inner.is_news(object, reason) {
            return;
        }
        let serial = inner.serial.fetch_add(1, Ordering::Relaxed);
        let at = SystemTime::now();
        let nanos = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let stem: String = object.name.chars().take(200).collect();
        let event = Event {
            name: format!("{}.{nanos:x}{serial:x}", stem.trim_end_matches(['.', '-'])),
            object: object.clone(),
            severity,
            reason,
            message: line(message),
            component: inner.component.clone(),
            instance: inner.instance.clone(),
            at,
        };
        if inner.queue.try_send(event).is_err() {
            metrics().events.with_label_values(&["dropped"]).inc();
        }
    }
}

impl Inner {
    fn is_news(&self, object: &Object, reason: &'static str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| at.elapsed() < REPEAT);
        if told.len() >= MAX_REMEMBERED || told.contains_key(&(object.clone(), reason)) {
            return false;
        }
        told.insert((object.clone(), reason), Instant::now());
        true
    }
}

/// One line of bounded length.
fn line(message: &str) -> String {
    let mut line = String::new();
    for c in message.chars() {
        if line.len() + c.len_utf8() + '…'.len_utf8() > MAX_MESSAGE {
            line.push('…');
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_that_the_api_accepts() {
        let long = line(&format!("a\nb{}", "é".repeat(2000)));
        assert!(long.starts_with("a b") && long.ends_with('…') && long.len() <= MAX_MESSAGE);
    }
}
