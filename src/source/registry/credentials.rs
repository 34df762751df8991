//! Docker's configuration of credentials, and which of them serve a host.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use serde::Deserialize;

use super::super::SourceError;
use super::super::image::DOCKER_HUB;
use crate::units::Digest;

/// Longest docker config that is read, in bytes (Kubernetes holds secrets to 1 MiB).
pub(super) const CONFIG_LIMIT: u64 = 1 << 20;

/// What one registry is shown. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Login {
    /// User and password.
    Password { user: String, password: String },
    /// A refresh token, exchanged for tokens at the registry's token service.
    Refresh(String),
    /// A token for the registry itself.
    Bearer(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(…)")
    }
}

impl Login {
    /// Keys tokens in memory: another login, other tokens. Never leaves the process.
    pub(super) fn fingerprint(&self) -> Digest {
        match self {
            Self::Password { user, password } => Digest::of(format!("p{}:{user}{password}", user.len()).as_bytes()),
            Self::Refresh(token) => Digest::of(format!("r{token}").as_bytes()),
            Self::Bearer(token) => Digest::of(format!("b{token}").as_bytes()),
        }
    }

    /// Stands for the user where nobody says who brought the login (the shell): the name, never the secret.
    pub(super) fn identity(&self) -> Digest {
        match self {
            Self::Password { user, .. } => Digest::of(format!("user:{user}").as_bytes()),
            Self::Refresh(_) | Self::Bearer(_) => Digest::of(b"token"),
        }
    }
}

/// `~/.docker/config.json`, or a secret of type `kubernetes.io/dockerconfigjson`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// The name of a registry under which its credentials are looked up: one for all of Docker Hub's.
pub(super) fn canonical_host(authority: &str) -> String {
    match authority.to_ascii_lowercase().as_str() {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => DOCKER_HUB.into(),
        other => other.into(),
    }
}

/// Host and path of a key of `auths`: `https://index.docker.io/v1/`, `ghcr.io`, `registry.example/team`, `*.example.com`.
fn split_key(key: &str) -> (String, &str) {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_matches('/');
    (canonical_host(host), if matches!(path, "v1" | "v2") { "" } else { path })
}

/// Whether a key's host (with `*` inside its labels, as the kubelet allows) is this host.
fn host_matches(pattern: &str, host: &str) -> bool {
    if !pattern.contains('*') {
        return pattern == host;
    }
    let (pattern, host): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), host.split('.').collect());
    let label = |p: &str, h: &str| match p.split_once('*') {
        None => p == h,
        // One star a label is all that anybody writes; more match nothing.
        Some((before, after)) => {
            !after.contains('*') && h.len() >= before.len() + after.len() && h.starts_with(before) && h.ends_with(after)
        }
    };
    pattern.len() == host.len() && pattern.iter().zip(host).all(|(p, h)| label(p, h))
}

/// The login for a repository: the entry with the longest path wins, then the one without a pattern. `helpers`: whether
/// credential helpers may be run (at the shell). `what` names the configuration in messages.
pub(super) async fn login_for(
    json: &str,
    host: &str,
    repository: &str,
    helpers: bool,
    what: &str,
) -> Result<Option<Login>, SourceError> {
    let invalid = |detail: String| SourceError::Invalid { what: what.into(), detail };
    // The parser's message may quote the text: only the place is told.
    let config: DockerConfig = serde_json::from_str(json)
        .map_err(|e| invalid(format!("is not a docker config (line {}, column {})", e.line(), e.column())))?;
    let host = canonical_host(host);
    let helper = config.cred_helpers.iter().find(|(key, _)| split_key(key).0 == host).map(|(_, helper)| helper);
    if let Some(helper) = helper {
        if !helpers {
            let detail = format!(
                "names the credential helper {helper:?} for {host}, which a node doesn't run; put the login into `auths`"
            );
            return Err(invalid(detail));
        }
        return run_helper(helper, &host).await;
    }
    let best = config
        .auths
        .iter()
        .map(|(key, entry)| (split_key(key), entry))
        .filter(|((pattern, path), _)| {
            let below = path.is_empty()
                || repository.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            host_matches(pattern, &host) && below
        })
        .max_by_key(|((pattern, path), _)| (path.len(), !pattern.contains('*')));
    let login = match best {
        Some((_, entry)) => entry.login().map_err(|detail| invalid(format!("the entry for {host} {detail}")))?,
        None => None,
    };
    match login {
        None if helpers && !config.creds_store.is_empty() => run_helper(&config.creds_store, &host).await,
        login => Ok(login),
    }
}

impl Entry {
    fn login(&self) -> Result<Option<Login>, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Login::Refresh(self.identitytoken.clone())));
        }
        if !self.registrytoken.is_empty() {
            return Ok(Some(Login::Bearer(self.registrytoken.clone())));
        }
        if !self.username.is_empty() {
            return Ok(Some(Login::Password { user: self.username.clone(), password: self.password.clone() }));
        }
        if self.auth.is_empty() {
            return Ok(None);
        }
        let engine = base64::engine::GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            base64::engine::GeneralPurposeConfig::new()
                .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
        );
        let decoded = engine.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let (user, password) = decoded
            .as_deref()
            .and_then(|text| text.trim_end_matches('\0').split_once(':'))
            .ok_or("has an `auth` that is not base64 of user:password; log in again")?;
        Ok(Some(Login::Password { user: user.into(), password: password.into() }))
    }
}

/// Asks `docker-credential-NAME get`. "Not found" is no login.
async fn run_helper(helper: &str, host: &str) -> Result<Option<Login>, SourceError> {
    use tokio::io::AsyncWriteExt;
    let program = format!("docker-credential-{helper}");
    let failed = |detail: String| SourceError::Invalid { what: program.clone(), detail };
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(failed("is not the name of a credential helper; correct the docker config".into()));
    }
    let server = if host == DOCKER_HUB { "https://index.docker.io/v1/" } else { host };
    let work = async {
        let mut child = tokio::process::Command::new(&program)
            .arg("get")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(server.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(std::time::Duration::from_secs(30), work)
        .await
        .map_err(|_| failed("did not answer within 30 s".into()))?
        .map_err(|e| failed(format!("can't be run: {e}; install it or log in without it")))?;
    /// A helper's answer.
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    if !output.status.success() {
        if String::from_utf8_lossy(&output.stdout).contains("not found") {
            return Ok(None);
        }
        return Err(failed(format!("failed ({}); log in again", output.status)));
    }
    let answer: Answer =
        serde_json::from_slice(&output.stdout).map_err(|_| failed("gave no valid answer; log in again".into()))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Login::Refresh(answer.secret),
        _ => Login::Password { user: answer.username, password: answer.secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn login(json: &str, host: &str, repository: &str) -> Option<String> {
        login_for(json, host, repository, false, "test").await.unwrap().map(|login| match login {
            Login::Password { user, password } => format!("{user}:{password}"),
            Login::Refresh(token) => format!("refresh {token}"),
            Login::Bearer(token) => format!("bearer {token}"),
        })
    }

    fn config(keys: &[&str]) -> String {
        let auths: serde_json::Map<String, serde_json::Value> =
            keys.iter().map(|k| ((*k).into(), serde_json::json!({"username": k, "password": "p"}))).collect();
        serde_json::json!({ "auths": auths }).to_string()
    }

    #[tokio::test]
    async fn every_spelling_of_a_host_is_found_and_no_other_host_gets_it() {
        for key in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io", "http://index.docker.io"] {
            assert!(login(&config(&[key]), "index.docker.io", "library/x").await.is_some(), "{key}");
            assert!(login(&config(&[key]), "docker.io.evil.example", "library/x").await.is_none(), "{key}");
        }
        assert!(login(&config(&["ghcr.io"]), "GHCR.io", "a/b").await.is_some());
        assert!(login(&config(&["h:5000"]), "h:5001", "a").await.is_none());
        assert!(login(&config(&["h"]), "h:5000", "a").await.is_none());
        assert!(login(&config(&["*.example.com"]), "a.example.com", "a").await.is_some());
        for host in ["example.com", "a.b.example.com", "a.example.com.evil"] {
            assert!(login(&config(&["*.example.com"]), host, "a").await.is_none(), "{host}");
        }
    }

    #[tokio::test]
    async fn the_longest_path_wins() {
        let json = config(&["h", "h/team", "h/team/app", "*"]);
        assert_eq!(login(&json, "h", "team/app").await.unwrap(), "h/team/app:p");
        assert_eq!(login(&json, "h", "team/app2").await.unwrap(), "h/team:p");
        assert_eq!(login(&json, "h", "teams").await.unwrap(), "h:p");
    }

    #[tokio::test]
    async fn every_form_of_a_login_is_read() {
        let json = |entry: &str| format!(r#"{{"auths":{{"h":{entry}}}}}"#);
        assert_eq!(login(&json(r#"{"auth":"dTpwOnE="}"#), "h", "a").await.unwrap(), "u:p:q");
        assert_eq!(login(&json(r#"{"auth":"dTpwOnE"}"#), "h", "a").await.unwrap(), "u:p:q");
        assert_eq!(login(&json(r#"{"identitytoken":"t","auth":"eDo="}"#), "h", "a").await.unwrap(), "refresh t");
        assert_eq!(login(&json(r#"{"registrytoken":"t"}"#), "h", "a").await.unwrap(), "bearer t");
        assert_eq!(login(&json("{}"), "h", "a").await, None);
        assert_eq!(login("{}", "h", "a").await, None);
    }

    #[tokio::test]
    async fn broken_configs_are_refused_without_showing_them() {
        for json in [r#"{"auths":{"h":{"auth":"U0VDUkVU"}}}"#, r#"{"auths": "SECRET""#, r#"{"auths":{"h":"SECRET"}}"#] {
            let error = login_for(json, "h", "a", false, "the pull secret").await.unwrap_err().to_string();
            assert!(
                !error.contains("SECRET") && !error.contains("U0VD") && error.contains("the pull secret"),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_node_runs_no_credential_helpers() {
        let json = r#"{"credHelpers":{"h":"evil"},"credsStore":"evil"}"#;
        let error = login_for(json, "h", "a", false, "x").await.unwrap_err().to_string();
        assert!(error.contains("evil") && error.contains("auths"), "{error}");
        assert_eq!(login(json, "other", "a").await, None);
        let slash = r#"{"credHelpers":{"h":"../evil"}}"#;
        assert!(login_for(slash, "h", "a", true, "x").await.unwrap_err().to_string().contains("not the name"));
    }

    #[test]
    fn logins_are_never_shown() {
        let login = Login::Password { user: "u".into(), password: "SECRET".into() };
        assert!(!format!("{login:?}").contains("SECRET"));
    }
}
