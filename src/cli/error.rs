//! Errors at the shell: one line, and an exit code that a script can tell apart.

use std::error::Error as _;
use std::io;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal as unix_signal};

use crate::archive::ArchiveError;
use crate::build::BuildError;
use crate::cache::CacheError;
use crate::config::ConfigError;
use crate::csi::CsiError;
use crate::fs::{ExtractError, OpenError};
use crate::mount::MountError;
use crate::source::SourceError;
use crate::telemetry::TelemetryError;

/// Why the process ends. Documented in the help, the man page and the README.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Any failure that has no code of its own.
    Failure = 1,
    /// The arguments or the configuration can't be used.
    Usage = 2,
    /// Bytes are not what their digest or format says.
    Corrupt = 3,
    /// The archive, image or path does not exist.
    NotFound = 4,
    /// Credentials are missing or wrong, or a policy refuses.
    Denied = 5,
    /// SIGINT or SIGTERM.
    Interrupted = 130,
}

impl Exit {
    /// Every code with its meaning.
    pub const ALL: &[(u8, &str)] = &[
        (0, "success"),
        (Self::Failure as u8, "failure"),
        (Self::Usage as u8, "the arguments or the configuration can't be used"),
        (Self::Corrupt as u8, "data is corrupt: not what its digest or its format says"),
        (Self::NotFound as u8, "the archive, image or path does not exist"),
        (Self::Denied as u8, "access denied: credentials are missing or wrong"),
        (Self::Interrupted as u8, "interrupted by a signal"),
    ];

    /// The codes as the help shows them.
    pub(super) fn table() -> String {
        let lines: Vec<_> = Self::ALL.iter().map(|(code, text)| format!("  {code:<4} {text}")).collect();
        format!("Exit codes:\n{}", lines.join("\n"))
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What can go wrong in a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// An archive can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A build failed.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The cache can't be used, or gave an error.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Unpacking stopped.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// A service can't be served.
    #[error(transparent)]
    Csi(#[from] CsiError),
    /// Logs or the HTTP endpoint.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// A part of an archive can't be decoded.
    #[error("{what}: {source}")]
    Archive {
        /// The archive.
        what: String,
        /// Why.
        source: ArchiveError,
    },
    /// The arguments contradict each other or name something that can't be used.
    #[error("{0}")]
    Usage(String),
    /// A path inside an archive, or a local file, does not exist.
    #[error("{0}")]
    NotFound(String),
    /// Data does not match its digest.
    #[error("{0}")]
    Corrupt(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// Operation and path.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Failed(String),
    /// The user or the system asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// Whoever read our output has gone: nothing to say.
    #[error("the reader of the output has gone")]
    OutputClosed,
}

impl CliError {
    /// An I/O error with its operation and path.
    pub(super) fn io(what: impl Into<String>, source: &io::Error) -> Self {
        let copy = source
            .raw_os_error()
            .map_or_else(|| io::Error::new(source.kind(), source.to_string()), io::Error::from_raw_os_error);
        Self::Io { what: what.into(), source: copy }
    }

    /// A failed write to stdout; a closed pipe is no error to tell.
    pub(super) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::io("writing the output", error)
        }
    }

    /// The exit code. Chosen here and nowhere else.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Open(OpenError::Archive { source, .. }) | Self::Archive { source, .. } => of_archive(source),
            Self::Open(OpenError::Source(e)) | Self::Source(e) | Self::Build(BuildError::Source(e)) => of_source(e),
            Self::Open(OpenError::Cache(e)) | Self::Cache(e) => of_cache(e),
            Self::Build(BuildError::BadLayer { .. }) | Self::Corrupt(_) => Exit::Corrupt,
            Self::Mount(MountError::Open(OpenError::Source(e))) => of_source(e),
            Self::Extract(ExtractError::Read { source, .. }) => of_cache(source),
            Self::Config(_) | Self::Usage(_) | Self::Csi(CsiError::Config { .. }) => Exit::Usage,
            Self::NotFound(_) => Exit::NotFound,
            Self::Io { source, .. } | Self::Extract(ExtractError::Io { source, .. }) => match source.kind() {
                io::ErrorKind::NotFound => Exit::NotFound,
                io::ErrorKind::PermissionDenied => Exit::Denied,
                _ => Exit::Failure,
            },
            Self::Interrupted => Exit::Interrupted,
            _ => Exit::Failure,
        }
    }

    /// The one line for the user, with the chain of causes where `verbose`; `None`: nothing to say.
    pub(super) fn render(&self, verbose: bool) -> Option<String> {
        if matches!(self, Self::OutputClosed) {
            return None;
        }
        let mut text = one_line(&self.to_string());
        let mut cause = self.source().filter(|_| verbose);
        while let Some(error) = cause {
            text += &format!("\n  caused by: {}", one_line(&error.to_string()));
            cause = error.source();
        }
        Some(text)
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

fn of_archive(error: &ArchiveError) -> Exit {
    match error {
        ArchiveError::Unsupported { .. } => Exit::Failure,
        _ => Exit::Corrupt,
    }
}

fn of_source(error: &SourceError) -> Exit {
    match error {
        SourceError::NotFound { .. } => Exit::NotFound,
        SourceError::Denied { .. } | SourceError::Refused { .. } => Exit::Denied,
        SourceError::Corrupt { .. } => Exit::Corrupt,
        SourceError::Invalid { .. } => Exit::Usage,
        _ => Exit::Failure,
    }
}

fn of_cache(error: &CacheError) -> Exit {
    match error {
        CacheError::Source(e) => of_source(e),
        CacheError::Corrupt { .. } | CacheError::Unverifiable { .. } => Exit::Corrupt,
        CacheError::Io { .. } => Exit::Failure,
    }
}

/// Waits for SIGINT or SIGTERM; gives its name.
pub(super) async fn signal() -> Result<&'static str, CliError> {
    let watch = |kind| unix_signal(kind).map_err(|e| CliError::io("watching for signals", &e));
    let mut interrupt = watch(SignalKind::interrupt())?;
    let mut terminate = watch(SignalKind::terminate())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_the_chain_is_for_the_verbose() {
        let error = CliError::Archive {
            what: "a.clip".into(),
            source: ArchiveError::Truncated { what: "header", need: 54, have: 3 },
        };
        let plain = error.render(false).unwrap();
        assert!(!plain.contains('\n') && plain.contains("a.clip") && plain.contains("fetch or build"), "{plain}");
        assert!(error.render(true).unwrap().contains("\n  caused by: truncated archive"));
        assert_eq!(CliError::Failed("a\n\n  b".into()).render(false).unwrap(), "a; b");
    }

    #[test]
    fn exit_codes_tell_corrupt_missing_and_denied_apart() {
        let (what, detail) = (String::new(), String::new());
        let not_found = SourceError::NotFound { what: what.clone(), detail: detail.clone() };
        let denied = SourceError::Denied { what: what.clone(), detail: detail.clone() };
        let corrupt = SourceError::Corrupt { what: what.clone(), detail: detail.clone() };
        assert_eq!(CliError::from(not_found.clone()).exit(), Exit::NotFound);
        assert_eq!(CliError::from(OpenError::from(not_found.clone())).exit(), Exit::NotFound);
        assert_eq!(CliError::from(BuildError::from(denied)).exit(), Exit::Denied);
        assert_eq!(CliError::from(CacheError::from(corrupt)).exit(), Exit::Corrupt);
        assert_eq!(CliError::from(CacheError::Corrupt { what, detail }).exit(), Exit::Corrupt);
        assert_eq!(CliError::io("x", &io::Error::from_raw_os_error(2)).exit(), Exit::NotFound);
        assert_eq!(CliError::Failed(String::new()).exit(), Exit::Failure);
    }
}
