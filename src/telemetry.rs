//! Logs, and the HTTP endpoint with `/metrics`, `/healthz` and `/readyz`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::metrics;

/// Requests in flight get this long when the endpoint is stopped.
const DRAIN: Duration = Duration::from_secs(3);

/// The `telemetry` section of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TelemetryConfig {
    /// How log lines are written. Default `json`.
    pub log_format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives like `info,clip_csi::source=debug`. Default `info`.
    /// `RUST_LOG` wins where it is set.
    pub log_level: String,
    /// `address:port` of `/metrics`, `/healthz` and `/readyz`; port 0: the kernel chooses, the log says. Empty (the
    /// default): not served.
    pub http_listen: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log_format: LogFormat::Json, log_level: "info".into(), http_listen: String::new() }
    }
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text.
    Text,
    /// One JSON object per line.
    #[default]
    Json,
}

/// Why telemetry can't start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter {value:?}: {detail}; write a level (error, warn, info, debug, trace) or target=level,…")]
    Filter {
        /// As given.
        value: String,
        /// The parser's words.
        detail: String,
    },
    /// Logging was set up before.
    #[error("logging can't be set up twice in one process: {0}")]
    Twice(String),
    /// The address can't be listened on.
    #[error("telemetry.httpListen {addr}: {detail}; choose a free address")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The system's words.
        detail: String,
    },
}

/// Parses a level or a list of directives.
pub fn filter(directives: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|e| TelemetryError::Filter { value: directives.into(), detail: e.to_string() })
}

/// `RUST_LOG` where it is set and not empty, else `fallback`.
fn directives_or(fallback: &str) -> String {
    std::env::var("RUST_LOG").ok().filter(|directives| !directives.is_empty()).unwrap_or_else(|| fallback.to_owned())
}

/// A level alone is that of our own code. Below `info` libraries tell each frame, and may tell headers with what is
/// secret in them: they say that only where they are named.
fn of_ours(directives: String) -> String {
    match directives.trim().to_ascii_lowercase().as_str() {
        level @ ("debug" | "trace") => format!("info,clip_csi={level}"),
        _ => directives,
    }
}

/// Sets logging up for a service: on stderr, in the configured format.
pub fn init_service(config: &TelemetryConfig) -> Result<(), TelemetryError> {
    let filter = filter(&of_ours(directives_or(&config.log_level)))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match config.log_format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
        LogFormat::Text => builder.compact().with_ansi(false).try_init(),
    }
    .map_err(|e| TelemetryError::Twice(e.to_string()))
}

/// Sets logging up for a command at the shell: short lines without times. `verbosity` 0: warnings, 1: what happens, 2: details,
/// 3 and more: everything.
pub fn init_shell<W>(verbosity: u8, writer: W) -> Result<(), TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let level = match verbosity {
        // What libraries warn of, they return as an error too, or it is not the user's business.
        0 => "error,clip_csi=warn",
        1 => "warn,clip_csi=info",
        2 => "info,clip_csi=debug",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter(&directives_or(level))?)
        .compact()
        .without_time()
        .with_target(verbosity > 1)
        .with_ansi(false)
        .with_writer(writer)
        .try_init()
        .map_err(|e| TelemetryError::Twice(e.to_string()))
}

/// Asked at every `/readyz`, and by CSI's Probe, so that both tell the same: `Err` says what is missing.
pub type Readiness = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The running HTTP endpoint. Dropping it stops it at once, [`HttpServer::stop`] lets requests in flight end.
#[derive(Debug)]
pub struct HttpServer {
    addr: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<io::Result<()>>,
}

impl HttpServer {
    /// Listens and serves.
    pub async fn start(addr: SocketAddr, ready: Readiness) -> Result<Self, TelemetryError> {
        let listen = |e: io::Error| TelemetryError::Listen { addr, detail: e.to_string() };
        let listener = TcpListener::bind(addr).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let router = Router::new()
            .route("/metrics", get(render))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(move || readyz(ready.clone())));
        let stop = CancellationToken::new();
        let serve = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        Ok(Self { addr, stop, task: tokio::spawn(serve.into_future()) })
    }

    /// Where it listens (the kernel's choice where the port was 0).
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops listening, lets requests in flight end, at most three seconds.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // An error is a connection that broke or did not end in time: nothing is left to be done for it.
        let _ = tokio::time::timeout(DRAIN, &mut self.task).await;
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn render() -> Response {
    match metrics::render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn readyz(ready: Readiness) -> Response {
    match ready().await {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readyz_says_what_the_readiness_says_and_metrics_are_served() {
        let up = Arc::new(AtomicBool::new(false));
        let ready: Readiness = {
            let up = up.clone();
            Arc::new(move || {
                let answer = if up.load(Ordering::SeqCst) { Ok(()) } else { Err("recovery is running".into()) };
                Box::pin(std::future::ready(answer))
            })
        };
        let server = HttpServer::start(([127, 0, 0, 1], 0).into(), ready).await.unwrap();
        let not_yet = get(server.addr(), "/readyz").await;
        assert!(not_yet.starts_with("HTTP/1.1 503") && not_yet.contains("recovery is running"), "{not_yet}");
        assert!(get(server.addr(), "/healthz").await.starts_with("HTTP/1.1 200"), "alive is not ready");
        up.store(true, Ordering::SeqCst);
        assert!(get(server.addr(), "/readyz").await.starts_with("HTTP/1.1 200"));
        let metrics = get(server.addr(), "/metrics").await;
        assert!(metrics.contains("text/plain; version=0.0.4") && metrics.contains("clip_open_mounts"), "{metrics}");
        let addr = server.addr();
        server.stop().await;
        assert!(TcpStream::connect(addr).await.is_err(), "stopped");
    }

    #[tokio::test]
    async fn an_address_in_use_is_an_error_that_names_it() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = taken.local_addr().unwrap();
        let error =
            HttpServer::start(addr, Arc::new(|| Box::pin(std::future::ready(Ok(()))))).await.unwrap_err().to_string();
        assert!(error.contains("telemetry.httpListen") && error.contains(&addr.to_string()), "{error}");
    }

    #[test]
    fn a_level_alone_makes_no_library_talk() {
        for (given, filter) in [
            ("debug", "info,clip_csi=debug"),
            (" TRACE", "info,clip_csi=trace"),
            ("warn", "warn"),
            ("info,h2=trace", "info,h2=trace"),
        ] {
            assert_eq!(of_ours(given.to_owned()), filter);
        }
    }

    #[test]
    fn a_filter_that_does_not_parse_is_named_with_its_remedy() {
        assert!(filter("info,clip_csi::source=debug").is_ok());
        let error = filter("clip_csi=loud").unwrap_err().to_string();
        assert!(error.contains("clip_csi=loud") && error.contains("write a level"), "{error}");
    }
}
