//! Unix sockets, and what every call passes through: dispatch, span, log line, metric.

use std::convert::Infallible;
use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status};
use tower::Service;
use tracing::Instrument as _;
use tracing::field::Empty;

use super::CsiError;
use super::authority::Tolerant;
use super::controller::ControllerService;
use super::identity::IdentityService;
use super::node::NodeService;
use super::proto::pluginregistration::registration_server::{self, RegistrationServer};
use super::proto::v1::controller_server::{self, ControllerServer};
use super::proto::v1::identity_client::IdentityClient;
use super::proto::v1::identity_server::{self, IdentityServer};
use super::proto::v1::node_server::{self, NodeServer};
use super::registration::RegistrationService;
use crate::metrics::metrics;

/// Longest path of a unix socket in bytes (sun_path without its NUL).
const MAX_SOCKET_PATH: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long our own socket may take to answer its first call.
const ANSWER: Duration = Duration::from_secs(10);

fn io(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> CsiError {
    let what = format!("{what} {}", path.display());
    move |error| CsiError::Io { what, detail: error.to_string() }
}

/// Listens on `path`, mode 0600: bound under a temporary name and renamed into place, so that the name never vanishes and
/// never leads to a socket that nobody listens on. Missing directories are made, 0700.
///
/// A socket that somebody answers on is left alone ([`CsiError::InUse`]): two plugins would take each other's mounts. A
/// DaemonSet update stops the old pod before it starts the new one (`maxSurge: 0`); with a surge the new one waits in
/// restarts until the old one is gone.
pub(super) async fn bind(path: &Path) -> Result<UnixListener, CsiError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(io("create directory", parent))?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let detail = "something that is no socket lies there; remove it, or choose another endpoint".to_owned();
            return Err(CsiError::Io { what: format!("bind {}", path.display()), detail });
        }
        Ok(_) => match UnixStream::connect(path).await {
            // Left behind by a process that is gone.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {}
            // Accepted, or its backlog is full: alive.
            _ => return Err(CsiError::InUse { path: path.to_owned() }),
        },
        Err(_) => {}
    }
    let temporary = temporary_name(path);
    let longest = temporary.as_os_str().len().max(path.as_os_str().len());
    if longest > MAX_SOCKET_PATH {
        let detail = format!("a socket's path holds {MAX_SOCKET_PATH} bytes, this needs {longest}; use a shorter one");
        return Err(CsiError::Io { what: format!("bind {}", path.display()), detail });
    }
    let _ = std::fs::remove_file(&temporary);
    let socket = listen(&temporary).map_err(io("bind", &temporary))?;
    std::fs::rename(&temporary, path).map_err(io("rename into place", path))?;
    UnixListener::from_std(socket).map_err(io("listen on", path))
}

/// As long as the name itself, so that it fits where that fits: `.` and the name without its first byte.
fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let rest: String = name.chars().skip(1).collect();
    path.with_file_name(format!(".{rest}"))
}

fn listen(path: &Path) -> std::io::Result<std::os::unix::net::UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before bind: the file gets the socket's own mode, there is no moment in which it is open to others.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// A channel to a unix socket.
pub(super) async fn dial(path: &Path) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).map_err(|error| error.to_string())?;
    endpoint.connect_timeout(ANSWER).connect().await.map_err(|error| error.to_string())
}

/// Calls Probe on our own socket; whatever it answers, it answers.
pub(super) async fn answers(path: &Path) -> Result<(), CsiError> {
    let no_answer = |detail: String| CsiError::NoAnswer { path: path.to_owned(), detail };
    let probe = async {
        let mut client = IdentityClient::new(dial(path).await?);
        match client.probe(super::proto::v1::ProbeRequest {}).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                tracing::warn!("serving, but {}", status.message());
                Ok(())
            }
            Err(status) => Err(status.to_string()),
        }
    };
    match tokio::time::timeout(ANSWER, probe).await {
        Ok(answer) => answer.map_err(no_answer),
        Err(_) => Err(no_answer(format!("nothing within {} s", ANSWER.as_secs()))),
    }
}

/// Serves until `stop`; then accepts nothing more and waits for the calls in flight.
pub(super) async fn serve(listener: UnixListener, services: Services, stop: CancellationToken) -> Result<(), CsiError> {
    let incoming = UnixListenerStream::new(listener).map(|accepted| accepted.map(Tolerant::new));
    let server = Server::builder().max_concurrent_streams(1024);
    let served = server.serve_with_incoming_shutdown(services, incoming, stop.cancelled_owned()).await;
    served.map_err(|error| CsiError::Io { what: "serve".into(), detail: error.to_string() })
}

/// The services behind one socket.
#[derive(Debug, Clone, Default)]
pub(super) struct Services {
    pub identity: Option<IdentityServer<IdentityService>>,
    pub node: Option<NodeServer<NodeService>>,
    pub controller: Option<ControllerServer<ControllerService>>,
    pub registration: Option<RegistrationServer<RegistrationService>>,
}

/// Every method that proto/ declares: the closed set of the label `method`.
pub(super) const METHODS: &[&str] = &[
    "GetPluginInfo",
    "GetPluginCapabilities",
    "Probe",
    "CreateVolume",
    "DeleteVolume",
    "ControllerPublishVolume",
    "ControllerUnpublishVolume",
    "ValidateVolumeCapabilities",
    "ListVolumes",
    "GetCapacity",
    "ControllerGetCapabilities",
    "CreateSnapshot",
    "DeleteSnapshot",
    "ListSnapshots",
    "GetSnapshot",
    "ControllerExpandVolume",
    "ControllerGetVolume",
    "ControllerModifyVolume",
    "NodeStageVolume",
    "NodeUnstageVolume",
    "NodePublishVolume",
    "NodeUnpublishVolume",
    "NodeGetVolumeStats",
    "NodeExpandVolume",
    "NodeGetCapabilities",
    "NodeGetInfo",
    "GetInfo",
    "NotifyRegistrationStatus",
];

/// Calls that change something: their success is worth a line at the default level.
const NOTABLE: &[&str] = &["CreateVolume", "DeleteVolume", "NodePublishVolume", "NodeUnpublishVolume"];

type Answer = Result<http::Response<Body>, Infallible>;

impl Services {
    fn dispatch(&mut self, request: http::Request<Body>) -> Option<BoxFuture<'static, Answer>> {
        let path = request.uri().path();
        let service = path.strip_prefix('/').and_then(|path| path.split_once('/')).map(|(service, _)| service);
        match service {
            Some(identity_server::SERVICE_NAME) => self.identity.as_mut().map(|service| service.call(request)),
            Some(node_server::SERVICE_NAME) => self.node.as_mut().map(|service| service.call(request)),
            Some(controller_server::SERVICE_NAME) => self.controller.as_mut().map(|service| service.call(request)),
            Some(registration_server::SERVICE_NAME) => self.registration.as_mut().map(|service| service.call(request)),
            _ => None,
        }
    }
}

impl Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Answer>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let name = request.uri().path().rsplit('/').next().unwrap_or_default();
        let method = METHODS.iter().find(|known| **known == name).copied().unwrap_or("unknown");
        let span = tracing::info_span!("rpc", method, volume_id = Empty, target = Empty);
        let answer = self.dispatch(request);
        async move {
            let mut call = Observed { method, started: Instant::now(), code: Code::Cancelled };
            let response = match answer {
                Some(answer) => answer.await?,
                None => Status::unimplemented("this socket does not serve that service").into_http(),
            };
            // A call that succeeds has its status in the trailers, one that fails in the headers.
            let status = Status::from_header_map(response.headers()).unwrap_or_else(|| Status::new(Code::Ok, ""));
            call.code = status.code();
            let ms = call.started.elapsed().as_millis();
            match status.code() {
                Code::Ok if NOTABLE.contains(&method) => tracing::info!(ms, "ok"),
                Code::Ok => tracing::debug!(ms, "ok"),
                Code::Aborted => tracing::info!(ms, "aborted: {}", status.message()),
                Code::Unimplemented => tracing::debug!(ms, "unimplemented"),
                code => tracing::warn!(ms, ?code, "failed: {}", status.message()),
            }
            Ok(response)
        }
        .instrument(span)
        .boxed()
    }
}

/// Counts a call when it ends, also when its caller hangs up.
struct Observed {
    method: &'static str,
    started: Instant,
    code: Code,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        metrics().rpc_seconds.with_label_values(&[self.method, code_name(self.code)]).observe(seconds);
    }
}

/// The label `code`.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn socket_and_directories_are_for_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/csi.sock");
        let _listener = bind(&path).await.unwrap();
        assert_eq!((mode(&path), mode(&dir.path().join("a")), mode(&dir.path().join("a/b"))), (0o600, 0o700, 0o700));
        let names: Vec<_> =
            std::fs::read_dir(dir.path().join("a/b")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["csi.sock"]);
    }

    #[tokio::test]
    async fn a_live_instance_is_left_alone_and_a_dead_one_replaced_without_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let first = bind(&path).await.unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        assert!(matches!(bind(&path).await, Err(CsiError::InUse { .. })));
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
        drop(first);
        assert!(path.exists(), "stopping unlinks nothing");
        let _second = bind(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_way_and_a_path_that_is_too_long_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        std::fs::write(&path, "mine").unwrap();
        assert!(bind(&path).await.unwrap_err().to_string().contains("no socket lies there"));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let long = dir.path().join("x".repeat(110));
        assert!(bind(&long).await.unwrap_err().to_string().contains("107 bytes"));
    }

    #[test]
    fn the_methods_are_those_of_the_protocol() {
        use prost::Message as _;
        let files = prost_types::FileDescriptorSet::decode(super::super::proto::DESCRIPTORS).unwrap().file;
        let mut declared: Vec<String> = files
            .iter()
            .flat_map(|file| &file.service)
            .flat_map(|service| service.method.iter().map(|method| method.name().to_owned()))
            .collect();
        let mut known = METHODS.to_vec();
        declared.sort();
        known.sort_unstable();
        assert_eq!(declared, known);
    }
}
