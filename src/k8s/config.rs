//! The `k8s` section of the configuration.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::KubeError;

/// Longest namespace: a DNS label.
const MAX_NAMESPACE: usize = 63;
/// Longest prefix and name of a taint's key.
const MAX_KEY: (usize, usize) = (253, 63);

/// The `k8s` section of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct KubeConfig {
    /// Whether the Kubernetes API is used. Default `auto`: in a pod that has a service account's token, or with `kubeconfig`.
    pub enabled: Enabled,
    /// A kubeconfig file; unset: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Where the ConfigMaps of volume records lie. Default: the pod's own namespace, or that of the kubeconfig's context.
    pub namespace: Option<String>,
    /// Write Events on pods and claims. Default true.
    pub events: bool,
    /// Remove the taint `startupTaint` from the node once the kubelet lists the driver. Default true.
    pub remove_startup_taint: bool,
    /// The key of that taint, whatever its value and effect. Default `clip.csi.beam.cloud/agent-not-ready`.
    pub startup_taint: String,
}

impl Default for KubeConfig {
    fn default() -> Self {
        Self {
            enabled: Enabled::Auto,
            kubeconfig: None,
            namespace: None,
            events: true,
            remove_startup_taint: true,
            startup_taint: format!("{}agent-not-ready", super::PREFIX),
        }
    }
}

impl KubeConfig {
    /// Checks every value. Errors name the key.
    pub fn validate(&self) -> Result<(), KubeError> {
        let bad = |key, detail: String| Err(KubeError::Config { key, detail });
        if self.kubeconfig.as_ref().is_some_and(|path| !path.is_absolute()) {
            return bad("kubeconfig", "it is no absolute path; write one, or leave it out".into());
        }
        if let Some(name) = &self.namespace
            && !label(name, MAX_NAMESPACE, b"-")
        {
            return bad("namespace", format!("{name:?} is no namespace; write its name, or leave it out"));
        }
        let key = self.startup_taint.as_str();
        let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
        if !label(name, MAX_KEY.1, b"-_.") || !prefix.is_none_or(|prefix| label(prefix, MAX_KEY.0, b"-.")) {
            return bad("startupTaint", format!("{key:?} is no key of a taint; write domain/name"));
        }
        Ok(())
    }
}

/// Alphanumeric at both ends, `inner` allowed between them.
fn label(text: &str, max: usize, inner: &[u8]) -> bool {
    let bytes = text.as_bytes();
    let edges = [bytes.first(), bytes.last()].iter().all(|b| b.is_some_and(u8::is_ascii_alphanumeric));
    edges && bytes.len() <= max && bytes.iter().all(|b| b.is_ascii_alphanumeric() || inner.contains(b))
}

/// `auto`, `true` or `false`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Enabled {
    /// Where there is something to connect with.
    #[default]
    Auto,
    /// Always; without it the service does not start.
    Yes,
    /// Never.
    No,
}

impl FromStr for Enabled {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "true" => Ok(Self::Yes),
            "false" => Ok(Self::No),
            _ => Err("write auto, true or false"),
        }
    }
}

impl Serialize for Enabled {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Yes => serializer.serialize_bool(true),
            Self::No => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Enabled {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;
        impl de::Visitor<'_> for Word {
            type Value = Enabled;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("auto, true or false")
            }
            fn visit_bool<E: de::Error>(self, yes: bool) -> Result<Enabled, E> {
                Ok(if yes { Enabled::Yes } else { Enabled::No })
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Enabled, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enabled_is_a_word_or_a_boolean() {
        let parse = |text: &str| serde_yaml_ng::from_str::<KubeConfig>(text).map(|config| config.enabled);
        assert_eq!(parse("{}").unwrap(), Enabled::Auto);
        for (text, enabled) in [("auto", Enabled::Auto), ("true", Enabled::Yes), ("\"false\"", Enabled::No)] {
            assert_eq!(parse(&format!("enabled: {text}")).unwrap(), enabled);
        }
        assert!(parse("enabled: perhaps").unwrap_err().to_string().contains("auto, true or false"));
    }

    #[test]
    fn a_value_that_can_not_work_is_named_by_its_key() {
        let base = KubeConfig::default;
        base().validate().unwrap();
        let bad = [
            ("k8s.kubeconfig", KubeConfig { kubeconfig: Some("kube/config".into()), ..base() }),
            ("k8s.namespace", KubeConfig { namespace: Some("a/b".into()), ..base() }),
            ("k8s.startupTaint", KubeConfig { startup_taint: "a/b/c".into(), ..base() }),
            ("k8s.startupTaint", KubeConfig { startup_taint: String::new(), ..base() }),
        ];
        for (key, config) in bad {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains("write"), "{error}");
        }
    }
}
