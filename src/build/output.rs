//! The file that a build writes: nobody sees it before it is whole.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use super::BuildError;
use super::layer::Bar;

/// An I/O error of a path.
pub(super) fn io_error(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BuildError {
    let what = what.into();
    move |error| BuildError::Io { what, detail: error.to_string() }
}

/// A temporary file beside its final path. Dropped without [`Output::commit`], it is deleted.
#[derive(Debug)]
pub(super) struct Output {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

/// The directory that holds `path`.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Output {
    /// Creates the temporary file, with the mode that the umask leaves of 0666.
    pub(super) fn create(path: &Path) -> Result<Self, BuildError> {
        let temporary = tempfile::Builder::new()
            .prefix(".clip-")
            .suffix(".tmp")
            .permissions(std::fs::Permissions::from_mode(0o666))
            .tempfile_in(directory(path))
            .map_err(io_error(format!("create a temporary file beside {}", path.display())))?;
        Ok(Self { temporary, path: path.to_owned() })
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        self.temporary.as_file()
    }

    /// An error of writing to it.
    pub(super) fn error(&self, error: std::io::Error) -> BuildError {
        io_error(format!("write {}", self.path.display()))(error)
    }

    /// Makes the content durable and gives the file its name, in place of what had it. Answers its length.
    pub(super) fn commit(self) -> Result<u64, BuildError> {
        let what = format!("write {}", self.path.display());
        let file = self.temporary.as_file();
        file.sync_all().map_err(io_error(&what))?;
        let length = file.metadata().map_err(io_error(&what))?.len();
        self.temporary.persist(&self.path).map_err(|e| io_error(&what)(e.error))?;
        // The name too must survive a crash.
        File::open(directory(&self.path)).and_then(|dir| dir.sync_all()).map_err(io_error(what))?;
        Ok(length)
    }
}

/// Runs blocking work on a thread for it.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(result: Result<Result<T, BuildError>, tokio::task::JoinError>) -> Result<T, BuildError> {
    match result {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(BuildError::Io { what: "a worker of the build".into(), detail: error.to_string() }),
    }
}

/// Says how far blocking work is.
pub(super) struct Work {
    done: mpsc::UnboundedSender<u64>,
}

impl Work {
    /// `bytes` more are done. An error once nobody waits for the work any more.
    pub(super) fn advance(&self, bytes: u64) -> Result<(), BuildError> {
        let abandoned = |_| BuildError::Io { what: "the build".into(), detail: "it was abandoned".into() };
        self.done.send(bytes).map_err(abandoned)
    }
}

/// As [`blocking`], with progress. The work ends early when the future is dropped.
pub(super) async fn blocking_with_bar<T: Send + 'static>(
    bar: &Bar<'_>,
    work: impl FnOnce(&Work) -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    let (done, mut reports) = mpsc::unbounded_channel();
    let task = tokio::task::spawn_blocking(move || work(&Work { done }));
    while let Some(bytes) = reports.recv().await {
        bar.advance(bytes);
    }
    joined(task.await)
}
