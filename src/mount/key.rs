//! What two volumes must agree on to share one mount, and how that mount is called.

use std::path::Path;

use crate::fs::Integrity;
use crate::fs::mountinfo::Mount;
use crate::units::Digest;

use super::MountKey;

/// First part of the source column (`mountinfo`) of all our mounts.
const PREFIX: &str = "clip-csi";

/// Hex digits of the key that name the mount: 128 bits, short enough to read in `mount`'s output.
const NAME_DIGITS: usize = 32;

/// Hex digits that name the installation.
const INSTANCE_DIGITS: usize = 8;

impl MountKey {
    /// The key of a mount: SHA-256 over everything that makes what is shown, and who may see it.
    ///
    /// - `archive`: the archive's digest, so that equal archives from different places share a mount; where it does not cover
    ///   the data, more ([`crate::fs::Opened::content`]);
    /// - `scope`: who may share fetched bytes ([`super::MountSpec::scope`]);
    /// - `bundle`: the view that is *shown*, not the one asked for: `auto` shares with what it comes to;
    /// - `integrity`: `strict` refuses reads that `digest` serves, so the two can't be one mount;
    /// - `selinux`: a mount has one context. `None` until mounts are made with one; it is part of the key already, so
    ///   that keys (and the names in `mountinfo`) stay when it comes.
    pub fn of(archive: &Digest, scope: &str, bundle: bool, integrity: Integrity, selinux: Option<&str>) -> Self {
        let root = if bundle { "bundle" } else { "archive" };
        let text = serde_json::json!(["mount", archive, scope, root, integrity, selinux]);
        Self(Digest::of(text.to_string().as_bytes()))
    }

    /// Name of the mount below `mounts_dir`: the first 32 hex digits.
    pub fn name(&self) -> String {
        let mut name = self.0.hex();
        name.truncate(NAME_DIGITS);
        name
    }
}

/// Tells the mounts of this installation from those of another one on the same node: 8 hex digits of SHA-256 of the
/// directory that the mounts lie in. The same after a restart.
pub(super) fn instance(mounts_dir: &Path) -> String {
    let mut name = Digest::of(mounts_dir.as_os_str().as_encoded_bytes()).hex();
    name.truncate(INSTANCE_DIGITS);
    name
}

/// The source column of a shared mount and of its binds: `clip-csi:<instance>:<name>`.
pub(super) fn fs_name(instance: &str, name: &str) -> String {
    format!("{PREFIX}:{instance}:{name}")
}

/// Reads a source column: `(instance, name)`, or `None` where it is no shared mount of any clip-csi plugin.
pub(super) fn parse_fs_name(source: &str) -> Option<(&str, &str)> {
    let (instance, name) = source.strip_prefix(PREFIX)?.strip_prefix(':')?.split_once(':')?;
    let hex = |text: &str, digits| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    (hex(instance, INSTANCE_DIGITS) && hex(name, NAME_DIGITS)).then_some((instance, name))
}

/// `(instance, name)` where this is a shared mount of a clip-csi plugin, or a bind of one.
pub(super) fn ours(mount: &Mount) -> Option<(&str, &str)> {
    mount.source.to_str().and_then(parse_fs_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_separates_mounts_changes_the_key() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let keys = [
            MountKey::of(&a, "public", false, Integrity::Digest, None),
            MountKey::of(&b, "public", false, Integrity::Digest, None),
            MountKey::of(&a, "secret", false, Integrity::Digest, None),
            MountKey::of(&a, "public", true, Integrity::Digest, None),
            MountKey::of(&a, "public", false, Integrity::Strict, None),
            MountKey::of(&a, "public", false, Integrity::Digest, Some("system_u:object_r:x:s0")),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(keys[0], MountKey::of(&a, "public", false, Integrity::Digest, None));
    }

    #[test]
    fn a_scope_can_not_imitate_another_field() {
        let a = Digest::of(b"a");
        assert_ne!(
            MountKey::of(&a, "x\",\"bundle", false, Integrity::Digest, None),
            MountKey::of(&a, "x", true, Integrity::Digest, None)
        );
    }

    #[test]
    fn only_our_source_columns_are_taken_for_ours() {
        let name = MountKey::of(&Digest::of(b"a"), "public", false, Integrity::Digest, None).name();
        let instance = instance(Path::new("/var/lib/kubelet/plugins/clip.csi.beam.cloud/mounts"));
        assert_eq!(parse_fs_name(&fs_name(&instance, &name)), Some((instance.as_str(), name.as_str())));
        for other in ["clip-csi", "clip-csi:", "clip-csi:abc:def", "tmpfs", "", "clip-csi:0123456z:", "/dev/sda1"] {
            assert_eq!(parse_fs_name(other), None, "{other}");
        }
    }
}
