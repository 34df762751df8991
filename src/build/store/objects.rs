//! Archives as files or objects: the archive, when it was used, and the mark of its end are three objects.

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::SystemTime;

use async_trait::async_trait;
use futures::TryStreamExt as _;

use super::shelf::{Seen, Shelf, Stored};
use super::{below, last_part, manifest_of};
use crate::build::BuildError;
use crate::source::{Credentials, Location, SourceError, Sources};

/// A directory or an S3 prefix.
#[derive(Debug)]
pub(super) struct Objects {
    root: Location,
    sources: Sources,
}

impl Objects {
    pub(super) fn new(root: Location, sources: Sources) -> Self {
        Self { root, sources }
    }

    /// `archives/x` and `uses`: `uses/x`.
    fn beside(&self, name: &str, folder: &str) -> Location {
        below(&self.root, &format!("{folder}/{}", name.rsplit('/').next().unwrap_or(name)))
    }

    async fn write(&self, location: &Location, file: &Path, create_only: bool) -> Result<bool, BuildError> {
        match self.sources.put(location, file, create_only, &Credentials::default(), &|_| {}).await {
            Ok(()) => Ok(true),
            Err(SourceError::Exists { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes an object that says what it is to people who find it.
    async fn note(&self, location: &Location, text: &str, create_only: bool) -> Result<bool, BuildError> {
        let io = |e: std::io::Error| BuildError::io("writing a temporary file", &e);
        let mut file = tempfile::NamedTempFile::new().map_err(io)?;
        file.write_all(text.as_bytes()).and_then(|()| file.flush()).map_err(io)?;
        self.write(location, file.path(), create_only).await
    }

    async fn written(&self, location: &Location) -> Result<Option<SystemTime>, BuildError> {
        Ok(self.sources.written(location, &Credentials::default()).await?)
    }

    async fn list_below(&self, folder: &str) -> Result<Vec<(String, SystemTime)>, BuildError> {
        let prefix = below(&self.root, &format!("{folder}/"));
        let listed = self.sources.list_with_times(&prefix, &Credentials::default()).await?;
        let ours = |(location, written): (Location, SystemTime)| {
            let name = last_part(&location).filter(|name| manifest_of(name).is_some())?.to_owned();
            (location == below(&self.root, &format!("{folder}/{name}"))).then_some((name, written))
        };
        Ok(listed.into_iter().filter_map(ours).collect())
    }
}

#[async_trait]
impl Shelf for Objects {
    async fn list(&self) -> Result<Vec<Stored>, BuildError> {
        let archives = self.list_below("archives").await?;
        let uses: std::collections::HashMap<_, _> = self.list_below("uses").await?.into_iter().collect();
        let stored = |(name, written): (String, SystemTime)| {
            let used = uses.get(&name).map_or(written, |used| written.max(*used));
            Stored { name: format!("archives/{name}"), used: Some(used) }
        };
        Ok(archives.into_iter().map(stored).collect())
    }

    async fn look(&self, name: &str) -> Result<Option<Seen>, BuildError> {
        let Some(written) = self.written(&below(&self.root, name)).await? else { return Ok(None) };
        let used = self.written(&self.beside(name, "uses")).await?;
        Ok(Some(Seen { used: used.map_or(written, |used| written.max(used)), state: String::new() }))
    }

    async fn put(&self, name: &str, file: Option<&Path>) -> Result<(), BuildError> {
        self.note(&self.beside(name, "uses"), "the time of this object says when a volume was last made\n", false)
            .await?;
        match file {
            Some(file) => self.write(&below(&self.root, name), file, true).await.map(drop),
            None if self.written(&below(&self.root, name)).await?.is_some() => Ok(()),
            None => Err(vanished(name)),
        }
    }

    async fn mark(&self, name: &str) -> Result<bool, BuildError> {
        self.note(&self.beside(name, "doomed"), "a controller is removing the archive of this name\n", true).await
    }

    async fn marked(&self, name: &str) -> Result<Option<SystemTime>, BuildError> {
        self.written(&self.beside(name, "doomed")).await
    }

    async fn unmark(&self, name: &str) -> Result<(), BuildError> {
        Ok(self.sources.delete(&self.beside(name, "doomed"), &Credentials::default()).await?)
    }

    async fn remove(&self, name: &str, _: &Seen) -> Result<(), BuildError> {
        for location in [below(&self.root, name), self.beside(name, "uses")] {
            self.sources.delete(&location, &Credentials::default()).await?;
        }
        Ok(())
    }
}

/// An archive that was there a moment ago.
pub(super) fn vanished(name: &str) -> BuildError {
    let detail = "it was removed from the archive store meanwhile; retry, and it is built again".into();
    SourceError::NotFound { what: format!("archive {name}"), detail }.into()
}

/// Streams an object to a local file: a temporary one beside it, flushed, then renamed.
pub(super) async fn fetch(sources: &Sources, location: &Location, to: &Path) -> Result<(), BuildError> {
    let source = sources.open(location, &Credentials::default()).await?;
    source.stat().await?;
    let mut stream = source.stream(0).await?;
    let mut file = temporary(to)?;
    while let Some(bytes) = stream.try_next().await? {
        file.write_all(&bytes).map_err(|e| BuildError::io(format!("writing {}", to.display()), &e))?;
    }
    persist(file, to)
}

/// A temporary file beside `to`.
pub(super) fn temporary(to: &Path) -> Result<tempfile::NamedTempFile, BuildError> {
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As readable as any file that is made: an archive is no secret of whoever fetched it. On a node the directory is closed.
    let file = tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(dir);
    file.map_err(|e| BuildError::io(format!("writing {}", to.display()), &e))
}

/// Makes a temporary file what is found at `to`.
pub(super) fn persist(file: tempfile::NamedTempFile, to: &Path) -> Result<(), BuildError> {
    let io = |e: std::io::Error| BuildError::io(format!("writing {}", to.display()), &e);
    file.as_file().sync_all().map_err(io)?;
    file.persist(to).map_err(|e| io(e.error))?;
    Ok(())
}
