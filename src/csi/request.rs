//! What every request is checked for, and how long its caller waits.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::proto::v1::volume_capability::{AccessType, access_mode::Mode};
use super::proto::v1::{CapacityRange, VolumeCapability};
use super::volume_context::AttributeError;

/// Longest id or name that CSI allows, in bytes.
const MAX_ID: usize = 128;
/// PATH_MAX.
const MAX_PATH: usize = 4096;
/// Mount flags that a read-only, nosuid, nodev volume fulfils already. `exec` is the default.
const HARMLESS_FLAGS: &[&str] =
    &["ro", "nosuid", "nodev", "exec", "noatime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime"];

/// Why a request can't be served as it is. All of these are the caller's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// A required field is empty.
    #[error("{field} is missing; it is required")]
    Missing {
        /// The field of the CSI request.
        field: &'static str,
    },
    /// A field holds what can't be used.
    #[error("{field} can't be used: {detail}")]
    Unusable {
        /// The field of the CSI request.
        field: &'static str,
        /// Why, and the remedy.
        detail: String,
    },
    /// An attribute, parameter or secret.
    #[error(transparent)]
    Attribute(#[from] AttributeError),
    /// What a claim says, or that it can't be read.
    #[error(transparent)]
    Claim(#[from] super::claim::ClaimError),
    /// A volume or its record is not there.
    #[error("volume {id:?} does not exist; create it first")]
    UnknownVolume {
        /// The id as given, cut.
        id: String,
    },
    /// CreateVolume: the name is taken by a volume with other parameters.
    #[error("a volume named {name:?} exists with other parameters; delete it first, or use another name")]
    NameTaken {
        /// The name, cut.
        name: String,
    },
    /// The controller has no store to keep records in.
    #[error(
        "this controller keeps no volumes: imageService.archiveStore is not set; set it to s3://bucket/prefix or file:///dir, \
         or use an inline or static volume, which need no controller"
    )]
    NoStore,
}

/// `text` cut to what a message may repeat of it.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// A volume id or name: there, bounded, without control characters.
pub(super) fn id<'a>(field: &'static str, value: &'a str) -> Result<&'a str, RequestError> {
    if value.is_empty() {
        return Err(RequestError::Missing { field });
    }
    if value.len() > MAX_ID {
        let detail = format!("it has {} bytes, CSI allows {MAX_ID}", value.len());
        return Err(RequestError::Unusable { field, detail });
    }
    if value.chars().any(char::is_control) {
        return Err(RequestError::Unusable { field, detail: "it holds control characters".into() });
    }
    Ok(value)
}

/// A path on the node: there, absolute, without `..`.
pub(super) fn path(field: &'static str, value: &str) -> Result<PathBuf, RequestError> {
    if value.is_empty() {
        return Err(RequestError::Missing { field });
    }
    let unusable = |detail: String| RequestError::Unusable { field, detail };
    if value.len() >= MAX_PATH || value.contains('\0') {
        return Err(unusable(format!("a path holds at most {} bytes and no NUL", MAX_PATH - 1)));
    }
    let path = Path::new(value);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(unusable(format!("{:?} is not absolute, or has .. in it", cut(value))));
    }
    Ok(path.components().collect())
}

/// A capability that a read-only directory can have.
///
/// No volume is ever written to, so every single-node mode holds (inline volumes and ReadWriteOnce claims arrive as
/// such). A mode that promises writers on several nodes is refused: whoever asks for it means to write.
pub(super) fn capability(field: &'static str, given: Option<&VolumeCapability>) -> Result<(), RequestError> {
    let given = given.ok_or(RequestError::Missing { field })?;
    let unusable = |detail: String| Err(RequestError::Unusable { field, detail });
    let mount = match &given.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return unusable("an image is no block device; use volumeMode: Filesystem".into());
        }
        None => return unusable("it has no access type; use a mount volume (volumeMode: Filesystem)".into()),
    };
    if !mount.volume_mount_group.is_empty() {
        return unusable("volume_mount_group is not supported: files keep the image's owners".into());
    }
    if let Some(flag) = mount.mount_flags.iter().find(|flag| !HARMLESS_FLAGS.contains(&flag.as_str())) {
        let known = HARMLESS_FLAGS.join(", ");
        return unusable(format!("mount option {:?} is not supported; known: {known}", cut(flag)));
    }
    // fs_type is a wish for how to format a device; there is none, so there is nothing to do about it.
    match given.access_mode.as_ref().map(|mode| mode.mode()) {
        Some(
            Mode::SingleNodeWriter
            | Mode::SingleNodeReaderOnly
            | Mode::SingleNodeSingleWriter
            | Mode::SingleNodeMultiWriter
            | Mode::MultiNodeReaderOnly,
        ) => Ok(()),
        Some(Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => {
            unusable("volumes are read-only; use the access mode ReadOnlyMany (ReadWriteMany promises writers)".into())
        }
        Some(Mode::Unknown) | None => unusable("it has no access mode; use ReadOnlyMany".into()),
    }
}

/// All capabilities of a request; there must be one.
pub(super) fn capabilities(field: &'static str, given: &[VolumeCapability]) -> Result<(), RequestError> {
    if given.is_empty() {
        return Err(RequestError::Missing { field });
    }
    given.iter().try_for_each(|one| capability(field, Some(one)))
}

/// Whether a volume that will be read-only was asked for with a mode that could write.
pub(super) fn asks_to_write(given: &[VolumeCapability]) -> bool {
    let modes = given.iter().filter_map(|one| one.access_mode.as_ref().map(|mode| mode.mode()));
    modes.into_iter().any(|mode| !matches!(mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly))
}

/// A capacity range that does not contradict itself. Its size is not ours to choose.
pub(super) fn capacity(range: Option<&CapacityRange>) -> Result<(), RequestError> {
    let Some(CapacityRange { required_bytes, limit_bytes }) = range else { return Ok(()) };
    if *required_bytes < 0 || *limit_bytes < 0 || (*limit_bytes != 0 && required_bytes > limit_bytes) {
        let detail = format!("{required_bytes} bytes required with a limit of {limit_bytes} is no range");
        return Err(RequestError::Unusable { field: "capacity_range", detail });
    }
    Ok(())
}

/// When a call must have been answered: shortly before its caller gives up (`grpc-timeout`), else after `default`.
/// The margin (a tenth of it, 2 s at most) lets the answer arrive, and say more than "deadline exceeded".
pub(super) fn deadline<T>(request: &tonic::Request<T>, default: Duration) -> Instant {
    let given = request.metadata().get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
    let wait = given.map_or(default, |given| given - (given / 10).min(Duration::from_secs(2)));
    Instant::now() + wait.min(Duration::from_secs(86_400))
}

/// The gRPC protocol's TimeoutValue TimeoutUnit: at most 8 digits, then one of H M S m u n.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::v1::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use super::*;

    fn mount(mode: Mode, flags: &[&str]) -> VolumeCapability {
        let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume { mount_flags, ..Default::default() })),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    #[test]
    fn read_only_and_single_node_modes_are_accepted_and_shared_writers_refused_with_the_remedy() {
        for mode in [Mode::SingleNodeWriter, Mode::SingleNodeReaderOnly, Mode::MultiNodeReaderOnly] {
            assert_eq!(capability("c", Some(&mount(mode, &["ro", "noatime"]))), Ok(()));
        }
        for mode in [Mode::MultiNodeMultiWriter, Mode::MultiNodeSingleWriter] {
            let error = capability("c", Some(&mount(mode, &[]))).unwrap_err().to_string();
            assert!(error.contains("ReadOnlyMany"), "{error}");
        }
        assert!(capability("c", Some(&mount(Mode::Unknown, &[]))).is_err());
        assert_eq!(capability("c", None), Err(RequestError::Missing { field: "c" }));
    }

    #[test]
    fn block_access_and_options_that_would_not_be_kept_are_refused() {
        let block =
            VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mount(Mode::Unknown, &[]) };
        assert!(capability("c", Some(&block)).unwrap_err().to_string().contains("volumeMode: Filesystem"));
        for flag in ["rw", "suid", "noexec", "uid=0"] {
            let error = capability("c", Some(&mount(Mode::SingleNodeWriter, &["ro", flag]))).unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
        }
    }

    #[test]
    fn paths_are_absolute_and_never_climb() {
        assert_eq!(path("p", "/a//b/").unwrap(), Path::new("/a/b"));
        for bad in ["", "a/b", "/a/../b", "/a\0b", &"/a".repeat(4096)] {
            assert!(path("p", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_answer_leaves_before_the_caller_gives_up() {
        assert_eq!(timeout("120S"), Some(Duration::from_secs(120)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "12", "123456789S", "-1S", "1x", "1é"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
        let mut request = tonic::Request::new(());
        request.set_timeout(Duration::from_secs(10));
        let wait = deadline(&request, Duration::from_secs(60)) - Instant::now();
        assert!(wait > Duration::from_secs(8) && wait <= Duration::from_secs(9), "{wait:?}");
    }

    #[test]
    fn a_range_that_contradicts_itself_is_refused() {
        let range = |required_bytes, limit_bytes| CapacityRange { required_bytes, limit_bytes };
        assert!(capacity(Some(&range(1 << 30, 0))).is_ok());
        assert!(capacity(Some(&range(2, 1))).is_err() && capacity(Some(&range(-1, 0))).is_err());
    }
}
