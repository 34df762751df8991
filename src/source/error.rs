//! What can go wrong when a blob is read.

/// Why bytes could not be had. Each names the thing, the cause and the remedy; none holds a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// 404, NoSuchKey, ENOENT.
    #[error("{what} was not found: {detail}")]
    NotFound {
        /// The thing, as [`super::BlobSource::describe`] says.
        what: String,
        /// What the place answered, and the remedy.
        detail: String,
    },
    /// 401/403: no or wrong credentials.
    #[error("access to {what} was denied: {detail}")]
    Denied {
        /// The thing.
        what: String,
        /// What the place answered, and the remedy.
        detail: String,
    },
    /// The policy refuses the location (untrusted location, host not allowed, …): no request was made.
    #[error("{what} is refused by this node's policy: {detail}")]
    Refused {
        /// The thing.
        what: String,
        /// Which rule, and which setting changes it.
        detail: String,
    },
    /// Transient: connection, timeout, 429, 5xx; all tries are used up.
    #[error("{what} can't be reached ({tries} tries): {detail}")]
    Unavailable {
        /// The thing.
        what: String,
        /// How often it was tried.
        tries: u32,
        /// The last answer.
        detail: String,
    },
    /// The place answered something that contradicts itself or the request: short body, wrong range, wrong digest, changed object.
    #[error("{what} gave wrong data: {detail}")]
    Corrupt {
        /// The thing.
        what: String,
        /// What contradicts what.
        detail: String,
    },
    /// The reference, location or configuration can't be used.
    #[error("{what}: {detail}")]
    Invalid {
        /// The thing.
        what: String,
        /// Why, and the remedy.
        detail: String,
    },
    /// create_only, and it is there.
    #[error("{what} exists already")]
    Exists {
        /// The thing.
        what: String,
    },
    /// A local I/O error.
    #[error("{what}: {detail}")]
    Io {
        /// The path and the operation.
        what: String,
        /// The system's words.
        detail: String,
    },
}

impl SourceError {
    /// The `kind` label of `clip_errors_total`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Denied { .. } => "denied",
            Self::Refused { .. } => "refused",
            Self::Unavailable { .. } => "unavailable",
            Self::Corrupt { .. } => "corrupt",
            Self::Invalid { .. } | Self::Exists { .. } => "invalid",
            Self::Io { .. } => "io",
        }
    }

    /// A failed system call on `what`: an absent file and a forbidden one have kinds of their own.
    pub(super) fn of_io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let what = what.to_string();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                Self::NotFound { what, detail: "there is no such file; check the path".into() }
            }
            ErrorKind::PermissionDenied => Self::Denied { what, detail: format!("{error}; check its owner and mode") },
            _ => Self::Io { what, detail: error.to_string() },
        }
    }
}
