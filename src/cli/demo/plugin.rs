//! The node plugin as a child process of its own, as it runs on a node, below one temporary directory; and what
//! brings everything to an end, however the demo ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::cli::CliError;
use crate::cli::service::HTTP;
use crate::config::{Config, ENVIRONMENT};
use crate::csi::client::CsiClient;
use crate::telemetry::LogFormat;

/// Tries to remove a directory in which something is still being written, and to see the end of a killed child.
const REMOVALS: u32 = 100;
/// Between two such tries.
const PAUSE: Duration = Duration::from_millis(50);
/// Who is connected to a process hears of its end before its parent does.
const NEWS: Duration = Duration::from_millis(500);
/// For the child to start, and to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the plugin logs once its CSI socket answers.
const SERVING: &str = "serving";

/// A directory that nothing outlives: mounts below it are detached and it is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Workplace {
    dir: tempfile::TempDir,
    /// Without symlinks, as mountinfo names it.
    path: PathBuf,
}

impl Workplace {
    pub(super) fn new() -> Result<Self, CliError> {
        let io = |e: std::io::Error| CliError::io("making a temporary directory", &e);
        let dir = tempfile::Builder::new().prefix("clip-demo-").tempdir().map_err(io)?;
        let path = dir.path().canonicalize().map_err(io)?;
        Ok(Self { dir, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is mounted below it, the last mount first.
    pub(super) fn mounts(&self) -> Vec<PathBuf> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
        let mut mounts: Vec<PathBuf> = points.filter(|point| point.starts_with(&self.path)).collect();
        mounts.reverse();
        mounts
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        for mount in self.mounts() {
            // Detached: a dead server is not waited for. An error means that it is gone already.
            let _ = rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH);
        }
        // A build that was given up may still be writing: it ends once its directory is gone.
        for _ in 0..REMOVALS {
            match std::fs::remove_dir_all(self.dir.path()) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => std::thread::sleep(PAUSE),
                _ => return,
            }
        }
    }
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while let Some(byte) = bytes.get(i) {
        let code = bytes.get(i + 1..i + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) if *byte == b'\\' => {
                out.push(code);
                i += 4;
            }
            _ => {
                out.push(*byte);
                i += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&out))
}

/// A child process. Dropped: killed, and gone.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // An error: it has ended already.
        let _ = self.0.start_kill();
        for _ in 0..REMOVALS {
            match self.0.try_wait() {
                Ok(None) => std::thread::sleep(PAUSE),
                _ => return,
            }
        }
    }
}

/// The running plugin. Dropped: killed.
#[derive(Debug)]
pub(super) struct Plugin {
    child: Process,
    http: SocketAddr,
    pub(super) client: CsiClient,
    pub(super) kubelet: PathBuf,
    log: PathBuf,
}

impl Plugin {
    /// Starts `clip-csi node` below `root` and waits until it serves.
    pub(super) async fn start(root: &Path) -> Result<Self, CliError> {
        let kubelet = root.join("kubelet");
        let log = root.join("node.log");
        let config = config(root, &kubelet);
        let socket = config.csi.socket_path()?;
        // A unix socket's path holds 107 bytes; in a deep TMPDIR that is not enough.
        if socket.as_os_str().len() > 100 {
            let detail = format!("{} is too long a path for a socket; set TMPDIR to a shorter one", socket.display());
            return Err(CliError::Failed(detail));
        }
        let file = root.join("config.yaml");
        let yaml = serde_yaml_ng::to_string(&config).map_err(|e| CliError::Failed(format!("writing YAML: {e}")))?;
        let io = |what: &Path, e: std::io::Error| CliError::io(what.display().to_string(), &e);
        for dir in [kubelet.join("plugins"), kubelet.join("plugins_registry"), kubelet.join("pods")] {
            std::fs::create_dir_all(&dir).map_err(|e| io(&dir, e))?;
        }
        std::fs::write(&file, yaml).map_err(|e| io(&file, e))?;

        let exe = std::env::current_exe().map_err(|e| CliError::io("finding this binary", &e))?;
        let mut command = Command::new(&exe);
        command.arg("node").arg("--config").arg(&file).env_remove("RUST_LOG").env_remove("CLIP_CSI_CONFIG");
        for var in ENVIRONMENT {
            command.env_remove(var.name);
        }
        // A group of its own: Ctrl-C reaches the demo, which then ends the plugin in order.
        command.process_group(0).kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = Process(command.spawn().map_err(|e| io(&exe, e))?);
        let stderr = child.0.stderr.take().ok_or_else(|| CliError::Failed("the plugin has no stderr".into()))?;
        let (tell, told) = oneshot::channel();
        tokio::spawn(keep_log(stderr, log.clone(), tell));
        let http = match tokio::time::timeout(PATIENCE, told).await {
            Ok(Ok(http)) => http,
            Ok(Err(_)) => return Err(CliError::Failed(format!("the node plugin ended at once: {}", tail(&log)))),
            Err(_) => return Err(CliError::Failed(format!("the node plugin does not serve: {}", tail(&log)))),
        };
        let client = CsiClient::connect(&socket).await.map_err(|e| CliError::Failed(e.to_string()))?;
        Ok(Self { child, http, client, kubelet, log })
    }

    /// How the archive of the last publish was told to be v1 or v2, as the plugin logged it.
    pub(super) fn detected_from(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let said = text.lines().rev().find_map(|line| {
            let fields: serde_json::Value = serde_json::from_str(line).ok()?;
            fields.get("detected_from")?.as_str().map(str::to_owned)
        });
        said.unwrap_or_else(|| "not said".into())
    }

    /// Sum of a metric's series.
    pub(super) async fn metric(&self, name: &str) -> Result<u64, CliError> {
        let io = |e: std::io::Error| CliError::io(format!("GET http://{}/metrics", self.http), &e);
        let mut stream = tokio::net::TcpStream::connect(self.http).await.map_err(io)?;
        let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.map_err(io)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(io)?;
        Ok(sum(&answer, name))
    }

    /// An error in the plugin's use; where the plugin has ended, that is what went wrong.
    pub(super) async fn explain(&mut self, error: CliError) -> CliError {
        match tokio::time::timeout(NEWS, self.child.0.wait()).await {
            Ok(Ok(status)) => {
                let said = tail(&self.log);
                CliError::Failed(format!(
                    "the node plugin ended by itself ({status}): {error}; its log ends with: {said}"
                ))
            }
            _ => error,
        }
    }

    /// SIGTERM, and its end.
    pub(super) async fn stop(mut self) -> Result<(), CliError> {
        let gone = || CliError::Failed(format!("the node plugin ended by itself: {}", tail(&self.log)));
        let pid = self.child.0.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or_else(gone)?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(|e| CliError::io("stopping the node plugin", &e.into()))?;
        match tokio::time::timeout(PATIENCE, self.child.0.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => {
                Err(CliError::Failed(format!("the node plugin ended with {status}: {}", tail(&self.log))))
            }
            Ok(Err(e)) => Err(CliError::io("waiting for the node plugin", &e)),
            Err(_) => Err(CliError::Failed("the node plugin did not end within 20 s of SIGTERM".into())),
        }
    }
}

fn config(root: &Path, kubelet: &Path) -> Config {
    let mut config = Config::default();
    config.image_service.clip_version = Some(2);
    config.image_service.archive_dir = root.join("archives");
    config.sources.archive_roots = vec![root.to_owned()];
    config.cache.dir = root.join("cache");
    config.mounts.state_dir = root.join("volumes");
    config.csi.kubelet_dir = kubelet.to_owned();
    config.csi.node_id = Some("demo-node".into());
    config.telemetry.http_listen = "127.0.0.1:0".into();
    config.telemetry.log_format = LogFormat::Json;
    config.follow_kubelet_dir();
    config
}

/// Copies the plugin's log to a file; tells where HTTP is served once CSI is, too.
async fn keep_log(stderr: tokio::process::ChildStderr, file: PathBuf, tell: oneshot::Sender<SocketAddr>) {
    let mut lines = BufReader::new(stderr).lines();
    let (mut tell, mut http) = (Some(tell), None);
    let Ok(mut file) = tokio::fs::File::create(file).await else { return };
    while let Ok(Some(line)) = lines.next_line().await {
        if file.write_all(format!("{line}\n").as_bytes()).await.is_err() {
            return;
        }
        let fields: BTreeMap<String, serde_json::Value> = serde_json::from_str(&line).unwrap_or_default();
        let text = |key: &str| fields.get(key).and_then(|value| value.as_str());
        match text("message") {
            Some(HTTP) => http = text("http").and_then(|addr| addr.parse().ok()),
            Some(SERVING) => {
                if let (Some(tell), Some(http)) = (tell.take(), http) {
                    // An error: nobody waits any more, the demo has ended.
                    let _ = tell.send(http);
                }
            }
            _ => {}
        }
    }
    let _ = file.flush().await;
}

/// The last line of the log that says what went wrong.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("it said nothing").to_owned()
}

/// Sum of a metric's series in the Prometheus text format.
fn sum(text: &str, name: &str) -> u64 {
    let series = text.lines().filter_map(|line| line.strip_prefix(name));
    let series = series.filter(|rest| rest.starts_with(['{', ' ']));
    series.filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_one_metric_are_summed_and_no_other() {
        let text = "# HELP a x\na_total{source=\"file\"} 3\na_total{source=\"s3\"} 4\na_total_more 9\nb 1\n";
        assert_eq!(sum(text, "a_total"), 7);
        assert_eq!(sum(text, "b"), 1);
        assert_eq!(sum(text, "c"), 0);
    }

    #[test]
    fn mountinfo_escapes_are_read() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape("/plain\\"), PathBuf::from("/plain\\"));
    }
}
