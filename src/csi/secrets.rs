//! The secret of a publish (`nodePublishSecretRef`), parsed once into credentials.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use base64::Engine as _;
use serde::Deserialize;

use super::volume_context::AttributeError;
use crate::source::{Credentials, S3Keys};
use crate::units::Digest;

/// Longest value of a key in bytes: Kubernetes' limit for a whole secret.
const MAX_SECRET: usize = 1 << 20;
/// Our name of each S3 key, and the one that other tools use.
const ACCESS_KEY: [&str; 2] = ["accessKeyId", "AWS_ACCESS_KEY_ID"];
const SECRET_KEY: [&str; 2] = ["secretAccessKey", "AWS_SECRET_ACCESS_KEY"];
const SESSION_TOKEN: [&str; 2] = ["sessionToken", "AWS_SESSION_TOKEN"];
/// The key of kubernetes.io/dockerconfigjson, and docker's own name of the file, which `--from-file` makes a key.
const DOCKER_CONFIGS: [&str; 2] = [DOCKER_CONFIG, "config.json"];
const DOCKER_CONFIG: &str = ".dockerconfigjson";

/// The credentials in a secret's data; an empty secret is nobody's.
///
/// Their identity is a digest over the namespace and the *names* in them (user per registry, S3 access key), never the
/// passwords: a rotated password keeps the shared mount. CSI hands over a secret's data but not its name and uid, so
/// these names stand for it. That lends nothing: within a namespace anybody may name that secret, and the registry is
/// asked anew for each pod. Where the namespace is unknown (`podInfoOnMount: false`) the passwords go into the digest, so
/// that tenants never meet.
pub(super) fn credentials(
    secrets: &HashMap<String, String>,
    namespace: Option<&str>,
) -> Result<Credentials, AttributeError> {
    if secrets.is_empty() {
        return Ok(Credentials::default());
    }
    for (key, value) in secrets.iter().collect::<BTreeMap<_, _>>() {
        let refuse = |detail: String| Err(AttributeError::Secret { key: super::request::cut(key), detail });
        let known = [ACCESS_KEY, SECRET_KEY, SESSION_TOKEN].concat().contains(&key.as_str());
        let known = known || DOCKER_CONFIGS.contains(&key.as_str());
        if key == ".dockercfg" {
            return refuse(format!(
                "this old format is not supported; make a secret of type kubernetes.io/dockerconfigjson ({DOCKER_CONFIG})"
            ));
        }
        if ["username", "password"].contains(&key.as_str()) {
            return refuse(
                "it does not say for which registry, and a password goes only to the registry it is for; make the secret with \
                 kubectl create secret docker-registry"
                    .into(),
            );
        }
        if !known {
            return refuse(format!(
                "it is unknown; use {DOCKER_CONFIG} for a registry, or {}, {} and optionally {} for S3",
                ACCESS_KEY[0], SECRET_KEY[0], SESSION_TOKEN[0]
            ));
        }
        if value.is_empty() || value.len() > MAX_SECRET {
            return refuse(format!("it has {} bytes; 1 to {MAX_SECRET} are accepted", value.len()));
        }
    }
    let docker = one_of(secrets, DOCKER_CONFIGS)?;
    let users = docker.map(|text| users(text)).transpose()?;
    let s3 = s3(secrets)?;
    let names = serde_json::json!([
        namespace,
        users,
        s3.as_ref().map(|keys| &keys.access_key),
        namespace.is_none().then(|| secrets.iter().collect::<BTreeMap<_, _>>()),
    ]);
    Ok(Credentials {
        docker_config: docker.map(|text| text.as_str().into()),
        s3: s3.map(Arc::new),
        identity: Some(Digest::of(names.to_string().as_bytes())),
    })
}

/// The value under either name; not both.
fn one_of<'a>(
    secrets: &'a HashMap<String, String>,
    [ours, theirs]: [&str; 2],
) -> Result<Option<&'a String>, AttributeError> {
    match (secrets.get(ours), secrets.get(theirs)) {
        (Some(_), Some(_)) => Err(AttributeError::Secret {
            key: theirs.to_owned(),
            detail: format!("it is {ours} by another name, and both are there; keep one"),
        }),
        (one, other) => Ok(one.or(other)),
    }
}

fn s3(secrets: &HashMap<String, String>) -> Result<Option<S3Keys>, AttributeError> {
    let get = |names| one_of(secrets, names).map(Option::<&String>::cloned);
    match (get(ACCESS_KEY)?, get(SECRET_KEY)?, get(SESSION_TOKEN)?) {
        (Some(access_key), Some(secret_key), session_token) => {
            Ok(Some(S3Keys { access_key, secret_key, session_token }))
        }
        (None, None, None) => Ok(None),
        (access_key, _, _) => {
            let missing = if access_key.is_some() { SECRET_KEY[0] } else { ACCESS_KEY[0] };
            let detail = "it is missing; S3 needs an access key and its secret key".to_owned();
            Err(AttributeError::Secret { key: missing.to_owned(), detail })
        }
    }
}

/// One registry of a docker config. Never printed.
#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    auth: String,
}

#[derive(Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
}

/// Registry and user of each entry.
fn users(text: &str) -> Result<BTreeMap<String, String>, AttributeError> {
    // serde's own message may quote what it read: it is not repeated.
    let refuse = |detail: &str| AttributeError::Secret { key: DOCKER_CONFIG.to_owned(), detail: detail.to_owned() };
    let config: DockerConfig = serde_json::from_str(text).map_err(|_| {
        refuse("it is not a docker config with auths; make it with kubectl create secret docker-registry")
    })?;
    let mut users = BTreeMap::new();
    for (host, entry) in config.auths {
        let user = if entry.username.is_empty() && !entry.auth.is_empty() {
            let pair = base64::engine::general_purpose::STANDARD.decode(entry.auth.trim()).ok();
            let user = pair.as_deref().and_then(|pair| pair.split(|b| *b == b':').next());
            let user = user.and_then(|user| std::str::from_utf8(user).ok());
            user.ok_or_else(|| refuse("the auth of a registry is not base64 of user:password"))?.to_owned()
        } else {
            entry.username
        };
        users.insert(host, user);
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)], namespace: Option<&str>) -> Result<Credentials, AttributeError> {
        let map = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        credentials(&map, namespace)
    }

    fn docker(user: &str, password: &str) -> String {
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        serde_json::json!({ "auths": { "registry.example": { "auth": auth } } }).to_string()
    }

    #[test]
    fn no_secret_is_nobody() {
        let none = of(&[], Some("team")).unwrap();
        assert!(none.identity.is_none() && none.docker_config.is_none() && none.s3.is_none());
    }

    #[test]
    fn a_rotated_password_keeps_the_identity_and_another_user_or_namespace_does_not() {
        let identity = |user: &str, password: &str, namespace: Option<&str>| {
            of(&[(".dockerconfigjson", &docker(user, password))], namespace).unwrap().identity.unwrap()
        };
        let base = identity("bob", "old", Some("team"));
        assert_eq!(base, identity("bob", "new", Some("team")));
        assert_ne!(base, identity("eve", "old", Some("team")));
        assert_ne!(base, identity("bob", "old", Some("other")));
        assert_ne!(identity("bob", "old", None), identity("bob", "new", None));
    }

    #[test]
    fn user_and_auth_are_the_same_identity() {
        let plain = r#"{"auths":{"registry.example":{"username":"bob","password":"p"}}}"#;
        let a = of(&[(".dockerconfigjson", plain)], Some("n")).unwrap().identity;
        assert_eq!(a, of(&[(".dockerconfigjson", &docker("bob", "q"))], Some("n")).unwrap().identity);
    }

    #[test]
    fn a_docker_config_is_taken_under_both_names_but_not_twice() {
        let config = docker("bob", "p");
        let ours = of(&[(".dockerconfigjson", &config)], Some("n")).unwrap();
        let theirs = of(&[("config.json", &config)], Some("n")).unwrap();
        assert_eq!((ours.identity, ours.docker_config), (theirs.identity, theirs.docker_config));
        assert!(of(&[(".dockerconfigjson", &config), ("config.json", &config)], None).is_err());
    }

    #[test]
    fn s3_keys_are_taken_under_both_names_and_only_together() {
        let keys = of(&[("accessKeyId", "AK"), ("AWS_SECRET_ACCESS_KEY", "SK")], None).unwrap().s3.unwrap();
        assert_eq!((keys.access_key.as_str(), keys.secret_key.as_str()), ("AK", "SK"));
        let error = of(&[("accessKeyId", "AK")], None).unwrap_err().to_string();
        assert!(error.contains("secretAccessKey"), "{error}");
        assert!(of(&[("accessKeyId", "a"), ("AWS_ACCESS_KEY_ID", "b"), ("secretAccessKey", "c")], None).is_err());
    }

    #[test]
    fn refusals_name_the_key_and_never_the_value() {
        let cases =
            [(".dockercfg", "hunter2"), ("password", "hunter2"), (".dockerconfigjson", "{\"hunter2\":hunter2}")];
        for (key, value) in cases {
            let error = of(&[(key, value)], Some("n")).unwrap_err().to_string();
            assert!(error.contains(key) && !error.contains("hunter2"), "{error}");
        }
        assert!(of(&[("username", "bob")], None).unwrap_err().to_string().contains("docker-registry"));
        assert!(of(&[(".dockercfg", "x")], None).unwrap_err().to_string().contains("kubernetes.io/dockerconfigjson"));
    }
}
