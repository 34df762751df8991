//! The seam to the kernel filesystem: what the manager needs of it, and the real one. The tests have another.

use std::fmt::Debug;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;

use crate::archive::{Kind, Version};
use crate::build::provider::Provider;
use crate::cache::Cache;
use crate::fs::fuse::{FuseOptions, FuseServer};
use crate::fs::{self, OpenError, OpenOptions, Opened};
use crate::metrics::metrics;
use crate::source::{BlobSource, Credentials, Location, Policy, SourceError, Sources};
use crate::units::Digest;

use super::sys::{self, Liveness};
use super::target::Swap;
use super::{MountError, MountSpec, io_error};

/// Opens archives.
#[async_trait]
pub(super) trait Server: Send + Sync + Debug {
    /// Which content lies at the archive's location now, asked with the volume's own credentials: the same answer means
    /// the same bytes, so what is known of them need not be fetched again.
    async fn identity(&self, spec: &MountSpec) -> Result<String, MountError>;
    /// Fetches the index and makes the filesystem; mounts nothing.
    async fn open(&self, spec: &MountSpec) -> Result<Arc<dyn Served>, MountError>;
    /// May the volume see this archive's data? Asked for each publish, before anything is shown: the cache may hold bytes
    /// that another volume's credentials fetched.
    async fn admit(&self, image: &dyn Served, spec: &MountSpec) -> Result<(), MountError>;
    /// Gives a spec from the journal, that of an archive in the node's store, its pin again.
    fn pin(&self, spec: &mut MountSpec) -> Result<(), MountError>;
    /// Does the filesystem mounted at `path` answer? Blocks, at most for `deadline`.
    fn probe(&self, path: &Path, deadline: Duration) -> Liveness {
        sys::probe(path, deadline)
    }
    /// How a new mount takes the place of a dead one.
    fn swap(&self) -> Swap {
        Swap::Beneath
    }
}

/// Where a subPath leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Relative to the shown root, every symlink resolved; `None`: the shown root itself.
    pub path: Option<PathBuf>,
    /// A directory, or a regular file.
    pub is_dir: bool,
}

/// One opened archive. Mounted at most once at a time, but again after its mount died.
pub(super) trait Served: Send + Sync + Debug {
    /// Where the data lies, if not in the archive itself.
    fn data_location(&self) -> Option<Location>;
    /// Of the archive, or of more where that does not cover its data.
    fn digest(&self) -> Digest;
    /// v1 or v2.
    fn version(&self) -> Version;
    /// How that was told.
    fn detected_from(&self) -> String;
    /// `/rootfs` is shown.
    fn bundle(&self) -> bool;
    /// Resolves a subPath in the index, as a chroot at the shown root would. The error says why not, and the remedy.
    fn resolve(&self, sub_path: &Path) -> Result<Place, String>;
    /// `(bytes, inodes)`, from the index.
    fn size(&self) -> (u64, u64);
    /// The last failed read since the archive was opened: how long ago, and file and cause in words.
    fn last_failure(&self) -> Option<(Duration, String)>;
    /// What is fetched from now on is fetched with these credentials.
    fn renew(&self, credentials: &Credentials);
    /// Mounts and serves. Blocks.
    fn mount(&self, mountpoint: &Path, fs_name: &str, runtime: Handle) -> io::Result<()>;
    /// Is it being served? False before [`Self::mount`] and after the kernel ended the session.
    fn is_alive(&self) -> bool;
    /// Ready when the session of the last [`Self::mount`] has ended, for whatever reason.
    fn ended(&self) -> BoxFuture<'static, ()>;
    /// Ends serving and detaches the shared mount; not mounted: fine. Blocks, bounded.
    fn unmount(&self) -> io::Result<()>;
    /// Ends serving and leaves the mount where it is: for a process that is about to end.
    fn abandon(&self);
}

/// The real one: `fs` over FUSE.
#[derive(Debug)]
pub(super) struct FuseServers {
    /// Under the node's policy: for what volumes name, and what archives name.
    sources: Sources,
    /// For files that the provider put into the node's own store, and for nothing else.
    own_files: Sources,
    cache: Arc<Cache>,
    provider: Provider,
}

impl FuseServers {
    pub(super) fn new(sources: Sources, cache: Arc<Cache>, provider: Provider) -> Result<Self, MountError> {
        let own_files = Sources::new(Policy { trusted: true, config: Default::default() }).map_err(OpenError::from)?;
        Ok(Self { sources, own_files, cache, provider })
    }

    async fn source(&self, spec: &MountSpec) -> Result<Arc<dyn BlobSource>, OpenError> {
        match &spec.pin {
            // The pin, not the location, says which file is trusted.
            Some(pin) => {
                let file = Location::File(pin.path().to_owned());
                Ok(self.own_files.open(&file, &Default::default()).await?)
            }
            None => Ok(self.sources.open(&spec.archive, &spec.credentials).await?),
        }
    }
}

#[async_trait]
impl Server for FuseServers {
    async fn identity(&self, spec: &MountSpec) -> Result<String, MountError> {
        let stat = self.source(spec).await?.stat().await.map_err(OpenError::from)?;
        Ok(format!("{} {}", stat.size, stat.identity))
    }

    async fn open(&self, spec: &MountSpec) -> Result<Arc<dyn Served>, MountError> {
        let asked = Instant::now();
        let options = OpenOptions {
            root: spec.root,
            integrity: spec.integrity,
            credentials: spec.lent(),
            scope: spec.scope.clone(),
        };
        let opened = fs::open(self.source(spec).await?, &self.sources, &self.cache, &options).await?;
        opened.fs.on_first_read(move || metrics().first_read_seconds.observe(asked.elapsed().as_secs_f64()));
        Ok(Arc::new(Image { opened, session: Mutex::new(None) }))
    }

    async fn admit(&self, image: &dyn Served, spec: &MountSpec) -> Result<(), MountError> {
        // The provider has asked the registry for the archives that it hands out.
        let (None, Some(location)) = (&spec.pin, image.data_location()) else { return Ok(()) };
        match self.sources.scope(&location, &spec.credentials).await {
            Ok(_) => Ok(()),
            // What can't be a place at all stands in the archive: that is what has to be put right.
            Err(SourceError::Invalid { what, detail }) => {
                let detail = format!("where its data lies can't be used: {what}: {detail}; build the archive again");
                Err(OpenError::Invalid { what: spec.archive.to_string(), detail }.into())
            }
            Err(error) => Err(OpenError::from(error).into()),
        }
    }

    fn pin(&self, spec: &mut MountSpec) -> Result<(), MountError> {
        let gone = || io_error("pinning the volume's archive", "it is no longer in the node's archive directory");
        let Location::File(path) = &spec.archive else { return Err(gone()) };
        spec.pin = Some(self.provider.pin(path).ok_or_else(gone)?);
        Ok(())
    }
}

#[derive(Debug)]
struct Image {
    opened: Opened,
    session: Mutex<Option<FuseServer>>,
}

impl Image {
    fn take_session(&self) -> Option<FuseServer> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Served for Image {
    fn data_location(&self) -> Option<Location> {
        self.opened.data_location()
    }

    fn digest(&self) -> Digest {
        self.opened.content
    }

    fn version(&self) -> Version {
        self.opened.archive.version()
    }

    fn detected_from(&self) -> String {
        self.opened.detected_from.clone()
    }

    fn bundle(&self) -> bool {
        self.opened.bundle
    }

    fn resolve(&self, sub_path: &Path) -> Result<Place, String> {
        let (tree, root) = (self.opened.fs.tree(), self.opened.fs.root());
        let node = tree.resolve(root, sub_path.as_os_str().as_bytes(), true).map_err(|e| {
            format!("{e} in the image; name a directory or file that the image has, relative to its root")
        })?;
        let is_dir = match tree.attr(node).kind {
            Kind::Dir => true,
            Kind::File => false,
            other => return Err(format!("it is a {other:?} in the image; only directories and files can be mounted")),
        };
        let (path, top) = (tree.path(node), tree.path(root));
        let outside = || "it leads out of the shown root".to_owned();
        let path = path.strip_prefix(top.strip_suffix(b"/").unwrap_or(&top)).ok_or_else(outside)?;
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let path = (!path.is_empty()).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(path)));
        Ok(Place { path, is_dir })
    }

    fn size(&self) -> (u64, u64) {
        let size = self.opened.fs.statfs();
        (size.bytes, size.inodes)
    }

    fn last_failure(&self) -> Option<(Duration, String)> {
        let failure = self.opened.fs.last_failure()?;
        Some((failure.at.elapsed(), format!("{}: {}", failure.path, failure.error)))
    }

    fn renew(&self, credentials: &Credentials) {
        self.opened.renew_credentials(credentials);
    }

    fn mount(&self, mountpoint: &Path, fs_name: &str, runtime: Handle) -> io::Result<()> {
        let options = FuseOptions { fs_name: fs_name.to_owned(), ..FuseOptions::default() };
        let server = FuseServer::mount(self.opened.fs.clone(), mountpoint, &options, runtime)?;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    fn is_alive(&self) -> bool {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(FuseServer::is_alive)
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        match self.session.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(session) => session.ended().boxed(),
            None => std::future::ready(()).boxed(),
        }
    }

    fn unmount(&self) -> io::Result<()> {
        self.take_session().map_or(Ok(()), FuseServer::unmount)
    }

    fn abandon(&self) {
        drop(self.take_session());
    }
}
