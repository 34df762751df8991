//! The one place where an error becomes a gRPC code.
//!
//! What the caller does with a code decides it. The kubelet takes CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE,
//! RESOURCE_EXHAUSTED and ABORTED as "may still be under way": it will unpublish before it forgets the volume. Every
//! other code tells it that nothing was left behind, which our publishes promise. It retries all of them, and shows the
//! message as an event of the pod: one line, no secret.
//!
//! | error | code |
//! |---|---|
//! | a request, attribute, reference or subPath that can't be used; not an archive | INVALID_ARGUMENT |
//! | not there (image, object, file, volume, target) | NOT_FOUND |
//! | 401, 403 | UNAUTHENTICATED |
//! | refused by this node's policy; a claim that would spend another namespace's secret | PERMISSION_DENIED |
//! | out of reach, all tries used | UNAVAILABLE |
//! | bytes that contradict their digest, the format or themselves | DATA_LOSS |
//! | target busy, or its parent missing; integrity can't be promised; newer format; no store; no access to the Kubernetes API | FAILED_PRECONDITION |
//! | published, or created, with other parameters | ALREADY_EXISTS |
//! | under way | ABORTED |
//! | a system call | INTERNAL |

use tonic::{Code, Status};

use super::claim::ClaimError;
use super::request::RequestError;
use crate::archive::ArchiveError;
use crate::build::BuildError;
use crate::cache::CacheError;
use crate::fs::OpenError;
use crate::k8s::KubeError;
use crate::metrics::metrics;
use crate::mount::MountError;
use crate::source::SourceError;

/// Longest message in bytes. Headers hold 16 KiB in all, and anything but ASCII takes three bytes for one there.
const MAX_MESSAGE: usize = 1500;

/// A status whose message is one line of bounded length.
pub(super) fn status(code: Code, message: &str) -> Status {
    let mut line = String::with_capacity(message.len().min(MAX_MESSAGE));
    for c in message.chars() {
        if line.len() + c.len_utf8() > MAX_MESSAGE {
            line.push('…');
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    Status::new(code, line)
}

/// Something is under way; the caller shall come again.
pub(super) fn aborted(message: &str) -> Status {
    status(Code::Aborted, message)
}

/// Code and kind (the label of `clip_errors_total`) of an error.
trait Classify: std::fmt::Display {
    fn classify(&self) -> (Code, &'static str);

    fn status(&self) -> Status {
        let (code, kind) = self.classify();
        metrics().errors.with_label_values(&[kind]).inc();
        status(code, &self.to_string())
    }
}

impl Classify for SourceError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::NotFound { .. } => (Code::NotFound, "not_found"),
            Self::Denied { .. } => (Code::Unauthenticated, "denied"),
            Self::Refused { .. } => (Code::PermissionDenied, "refused"),
            Self::Unavailable { .. } => (Code::Unavailable, "unavailable"),
            Self::Corrupt { .. } => (Code::DataLoss, "corrupt"),
            Self::Invalid { .. } => (Code::InvalidArgument, "invalid"),
            Self::Exists { .. } => (Code::AlreadyExists, "invalid"),
            Self::Io { .. } => (Code::Internal, "io"),
        }
    }
}

impl Classify for ArchiveError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::BadMagic { .. } | Self::TooLarge { .. } => (Code::InvalidArgument, "invalid"),
            Self::Truncated { .. } | Self::Corrupt { .. } => (Code::DataLoss, "corrupt"),
            Self::Unsupported { .. } => (Code::FailedPrecondition, "invalid"),
        }
    }
}

impl Classify for CacheError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::Source(source) => source.classify(),
            Self::Corrupt { .. } => (Code::DataLoss, "corrupt"),
            Self::Unverifiable { .. } => (Code::FailedPrecondition, "unverifiable"),
            Self::Io { .. } => (Code::Internal, "io"),
        }
    }
}

impl Classify for OpenError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::Archive { source, .. } => source.classify(),
            Self::Source(source) => source.classify(),
            Self::Cache(cache) => cache.classify(),
            Self::Invalid { .. } => (Code::InvalidArgument, "invalid"),
        }
    }
}

impl Classify for BuildError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::Source(source) => source.classify(),
            Self::Archive(archive) => archive.classify(),
            Self::Shared(shared) => shared.classify(),
            Self::BadLayer { .. } => (Code::DataLoss, "corrupt"),
            Self::V2Impossible { .. } => (Code::FailedPrecondition, "invalid"),
            Self::BadImage { .. } => (Code::InvalidArgument, "invalid"),
            Self::Io { .. } => (Code::Internal, "io"),
        }
    }
}

impl Classify for MountError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::Open(open) => open.classify(),
            // CSI has the caller make the parent, and the plugin the target: the call is well formed (not INVALID_ARGUMENT), and
            // NOT_FOUND would say that the volume is gone. Once the directory is there the same call succeeds.
            Self::NoParent { .. } => (Code::FailedPrecondition, "invalid"),
            Self::Busy { .. } => (Code::FailedPrecondition, "invalid"),
            Self::Conflict { .. } => (Code::AlreadyExists, "invalid"),
            Self::SubPath { .. } => (Code::InvalidArgument, "invalid"),
            Self::NotPublished { .. } => (Code::NotFound, "not_found"),
            Self::Io { .. } => (Code::Internal, "io"),
        }
    }
}

impl Classify for KubeError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::NotFound { .. } => (Code::NotFound, "not_found"),
            // Our own rights, not the caller's.
            Self::Denied { .. } => (Code::FailedPrecondition, "denied"),
            Self::Conflict { .. } => (Code::Aborted, "unavailable"),
            Self::Unavailable { .. } => (Code::Unavailable, "unavailable"),
            Self::Invalid { .. } | Self::Config { .. } => (Code::Internal, "invalid"),
        }
    }
}

impl Classify for ClaimError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::NoApi | Self::NoMetadata | Self::OtherClass { .. } => (Code::FailedPrecondition, "invalid"),
            Self::Gone { .. } | Self::Replaced { .. } => (Code::NotFound, "not_found"),
            Self::Fixed { .. } | Self::Layout { .. } => (Code::InvalidArgument, "invalid"),
            Self::ForeignSecret { .. } => (Code::PermissionDenied, "refused"),
            Self::Api(api) => api.classify(),
        }
    }
}

impl Classify for RequestError {
    fn classify(&self) -> (Code, &'static str) {
        match self {
            Self::Missing { .. } | Self::Unusable { .. } | Self::Attribute(_) => (Code::InvalidArgument, "invalid"),
            Self::Claim(claim) => claim.classify(),
            Self::UnknownVolume { .. } => (Code::NotFound, "not_found"),
            Self::NameTaken { .. } => (Code::AlreadyExists, "invalid"),
            Self::NoStore => (Code::FailedPrecondition, "invalid"),
        }
    }
}

macro_rules! into_status {
    ($($error:ty),+) => { $(
        impl From<$error> for Status {
            fn from(error: $error) -> Self {
                Classify::status(&error)
            }
        }
    )+ };
}
into_status!(SourceError, CacheError, OpenError, BuildError, MountError, RequestError);

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> String {
        s.to_owned()
    }

    #[test]
    fn the_cause_decides_the_code_however_deep_it_lies() {
        let denied = SourceError::Denied { what: text("registry.example/x"), detail: text("401; name a pull secret") };
        assert_eq!(Status::from(denied.clone()).code(), Code::Unauthenticated);
        assert_eq!(Status::from(BuildError::from(denied.clone())).code(), Code::Unauthenticated);
        let deep = MountError::from(OpenError::from(CacheError::from(denied)));
        let status = Status::from(deep);
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(status.message().contains("name a pull secret"));
    }

    #[test]
    fn only_what_may_still_be_under_way_has_a_code_that_the_kubelet_takes_so() {
        let out_of_reach = SourceError::Unavailable { what: text("x"), tries: 5, detail: text("timeout") };
        assert_eq!(Status::from(out_of_reach).code(), Code::Unavailable);
        let final_codes = [
            Status::from(SourceError::NotFound { what: text("x"), detail: text("404") }),
            Status::from(SourceError::Refused { what: text("x"), detail: text("archiveRoots") }),
            Status::from(SourceError::Corrupt { what: text("x"), detail: text("digest") }),
            Status::from(SourceError::Io { what: text("x"), detail: text("EIO") }),
            Status::from(MountError::Busy { path: "/t".into(), detail: text("tmpfs") }),
            Status::from(MountError::Conflict { path: "/t".into(), detail: text("image") }),
            Status::from(MountError::NotPublished { path: "/t".into() }),
            Status::from(RequestError::NoStore),
        ];
        let not_final =
            [Code::Cancelled, Code::DeadlineExceeded, Code::Unavailable, Code::ResourceExhausted, Code::Aborted];
        for status in final_codes {
            assert!(!not_final.contains(&status.code()), "{status:?}");
        }
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let long = status(Code::Internal, &format!("a\nb\r\tc{}", "é".repeat(5000)));
        assert!(!long.message().contains(['\n', '\r', '\t']));
        assert!(long.message().starts_with("a b  c") && long.message().len() < MAX_MESSAGE + 4);
    }
}
