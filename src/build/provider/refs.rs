//! What this node knows of references that it resolved: the manifest, and whom the registry let in.
//!
//! One JSON file per (reference, platform). Losing one costs a question to the registry, nothing else, so damage is
//! treated as absence.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::source::{Credentials, ImageRef, Scope};
use crate::units::{Digest, Platform};

/// Identities kept per reference; beyond it the record starts anew.
const MAX_IDENTITIES: usize = 256;
/// A record holds at most [`MAX_IDENTITIES`] digests; anything larger was not written here.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// One resolved reference.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RefRecord {
    pub(super) manifest_digest: Digest,
    /// As the image states it: more exact, as a rule, than what was asked for. Archives are named by it.
    pub(super) platform: Platform,
    public: bool,
    /// Whom the registry let in: by identity, the scope and the credentials that it took last.
    admitted: BTreeMap<Digest, Admitted>,
}

/// Of one identity.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Admitted {
    scope: Digest,
    /// [`Credentials::fingerprint`]: an identity is a name, which others may give too.
    credentials: Digest,
}

impl RefRecord {
    /// An anonymous pull succeeded.
    pub(super) fn is_public(&self) -> bool {
        self.public
    }

    /// The registry has let these credentials in, or lets everybody in.
    pub(super) fn admits(&self, credentials: &Credentials) -> bool {
        let same = |known: &Admitted| known.credentials == credentials.fingerprint();
        self.public || self.known(credentials).is_some_and(same)
    }

    fn known(&self, credentials: &Credentials) -> Option<&Admitted> {
        self.admitted.get(&credentials.identity?)
    }

    /// The scope in which these credentials share what is fetched. A stranger's own identity is a scope of its own.
    pub(super) fn scope_for(&self, credentials: &Credentials) -> Scope {
        match (self.public, self.known(credentials)) {
            (true, _) => Scope::Public,
            (false, Some(known)) => Scope::Private(known.scope),
            (false, None) => Scope::Private(credentials.identity.unwrap_or(self.manifest_digest)),
        }
    }
}

/// The records of one node.
#[derive(Debug)]
pub(super) struct RefRecords {
    dir: PathBuf,
}

impl RefRecords {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The name of a record.
    pub(super) fn key(image: &ImageRef, platform: &Platform) -> String {
        Digest::of(format!("{image} {platform}").as_bytes()).hex()
    }

    pub(super) fn load(&self, key: &str) -> Option<RefRecord> {
        let path = self.dir.join(key);
        if std::fs::metadata(&path).ok()?.len() > MAX_RECORD_BYTES {
            return None;
        }
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Remembers a resolution that the registry just confirmed.
    pub(super) fn remember(
        &self,
        key: &str,
        (manifest_digest, platform): (Digest, Platform),
        scope: Scope,
        credentials: &Credentials,
    ) {
        let mut record = self
            .load(key)
            .filter(|record| record.manifest_digest == manifest_digest && record.admitted.len() < MAX_IDENTITIES)
            .unwrap_or(RefRecord {
                manifest_digest,
                platform: platform.clone(),
                public: false,
                admitted: BTreeMap::new(),
            });
        record.platform = platform;
        record.public = scope == Scope::Public;
        if let (Scope::Private(scope), Some(identity)) = (scope, credentials.identity) {
            record.admitted.insert(identity, Admitted { scope, credentials: credentials.fingerprint() });
        }
        if let Err(error) = self.write(key, &record) {
            warn!(%error, "a resolved reference can't be remembered: the registry will be asked again");
        }
    }

    fn write(&self, key: &str, record: &RefRecord) -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.persist(self.dir.join(key))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(name: &str) -> Credentials {
        Credentials { identity: Some(Digest::of(name.as_bytes())), ..Credentials::default() }
    }

    #[test]
    fn a_private_image_admits_only_whom_the_registry_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let records = RefRecords::new(dir.path().to_owned());
        let (manifest, scope) = (Digest::of(b"m"), Scope::Private(Digest::of(b"scope")));
        records.remember("k", (manifest, Platform::host()), scope, &who("alice"));
        let record = records.load("k").unwrap();
        assert!(record.admits(&who("alice")) && !record.admits(&who("bob")) && !record.admits(&Credentials::default()));
        assert_eq!(record.scope_for(&who("alice")), scope);
        assert_ne!(record.scope_for(&who("bob")), scope);
    }

    /// Namespace and user name make an identity; the password is not in it.
    #[test]
    fn whoever_gives_the_same_name_needs_the_credentials_that_the_registry_took() {
        let dir = tempfile::tempdir().unwrap();
        let records = RefRecords::new(dir.path().to_owned());
        let with = |config: &str| Credentials { docker_config: Some(config.into()), ..who("alice") };
        let named = || (Digest::of(b"m"), Platform::host());
        let scope = Scope::Private(Digest::of(b"scope"));
        records.remember("k", named(), scope, &with("good"));
        let record = records.load("k").unwrap();
        assert!(record.admits(&with("good")) && !record.admits(&with("guess")) && !record.admits(&who("alice")));
        records.remember("k", named(), scope, &with("rotated"));
        let record = records.load("k").unwrap();
        assert!(record.admits(&with("rotated")) && !record.admits(&with("good")), "the last that was taken counts");
    }

    #[test]
    fn a_moved_tag_forgets_who_was_admitted_to_the_old_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let records = RefRecords::new(dir.path().to_owned());
        let scope = Scope::Private(Digest::of(b"scope"));
        records.remember("k", (Digest::of(b"old"), Platform::host()), scope, &who("alice"));
        records.remember("k", (Digest::of(b"new"), Platform::host()), scope, &who("bob"));
        let record = records.load("k").unwrap();
        assert!(record.admits(&who("bob")) && !record.admits(&who("alice")));
    }

    #[test]
    fn a_damaged_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("k"), b"{\"manifestDigest\":").unwrap();
        assert!(RefRecords::new(dir.path().to_owned()).load("k").is_none());
    }
}
