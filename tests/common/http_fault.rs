//! An HTTP server that answers as a test tells it, rightly or wrongly, and remembers what it was asked.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, Method};

/// A request as it came.
#[derive(Clone)]
pub struct Seen {
    pub method: Method,
    /// Path and query.
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?} + {} bytes", self.method, self.path, self.headers, self.body.len())
    }
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// First and last byte (inclusive) of its Range header; an open end is `u64::MAX`.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, if last.is_empty() { u64::MAX } else { last.parse().ok()? }))
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// The connection breaks after so many bytes of the body.
    pub cut: Option<usize>,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new(), cut: None }
    }

    pub fn ok(body: impl Into<Bytes>) -> Self {
        Self { body: body.into(), ..Self::status(200) }
    }

    pub fn redirect(to: &str) -> Self {
        Self::status(307).with("location", to)
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(n, _)| n != name);
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn cut_after(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }

    /// What a good server answers for these bytes, with or without a Range header.
    pub fn range(seen: &Seen, whole: &Bytes) -> Self {
        let size = whole.len() as u64;
        let Some((first, last)) = seen.range() else { return Self::ok(whole.clone()) };
        if first >= size {
            return Self::status(416).with("content-range", &format!("bytes */{size}"));
        }
        let last = last.min(size - 1);
        let body = whole.slice(first as usize..=last as usize);
        Self { body, ..Self::status(206) }.with("content-range", &format!("bytes {first}-{last}/{size}"))
    }
}

/// A server that lives as long as this guard.
#[derive(Debug)]
pub struct Server {
    host: String,
    log: Arc<Mutex<Vec<Seen>>>,
    came: tokio::sync::watch::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Answers by `handler`, which gets the request and how many came before it.
    pub async fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let log: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let came = tokio::sync::watch::Sender::new(());
        let (remember, handler, tell) = (log.clone(), Arc::new(handler), came.clone());
        let answer = move |request: Request| {
            let (remember, handler, tell) = (remember.clone(), handler.clone(), tell.clone());
            async move {
                let (parts, body) = request.into_parts();
                let seen = Seen {
                    method: parts.method,
                    path: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
                    headers: parts.headers,
                    body: axum::body::to_bytes(body, 64 << 20).await.unwrap_or_default(),
                };
                let before = {
                    let mut log = remember.lock().expect("no test panicked with the log");
                    log.push(seen.clone());
                    log.len() - 1
                };
                tell.send_replace(());
                respond(handler(&seen, before))
            }
        };
        let app = axum::Router::new().fallback(answer);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let host = listener.local_addr().expect("an address").to_string();
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Self { host, log, came, task }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// `http://127.0.0.1:port` and a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host)
    }

    /// Ready once `condition` holds of what it was asked. For a caller with a deadline.
    pub async fn until(&self, condition: impl Fn(&[Seen]) -> bool) {
        let mut came = self.came.subscribe();
        while !condition(&self.seen()) {
            came.changed().await.expect("the server lives");
        }
    }

    /// What it was asked so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().expect("no test panicked with the log").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn respond(reply: Reply) -> Response {
    let mut response = Response::builder().status(reply.status);
    for (name, value) in &reply.headers {
        response = response.header(name, value);
    }
    let body = match reply.cut {
        None => Body::from(reply.body),
        Some(cut) => {
            if !reply.headers.iter().any(|(name, _)| name == "content-length") {
                response = response.header("content-length", reply.body.len());
            }
            let start = reply.body.slice(..cut.min(reply.body.len()));
            let broken = async {
                // The server writes out what it has when the body makes it wait.
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut by the test"))
            };
            Body::from_stream(futures::stream::iter([Ok(start)]).chain(futures::stream::once(broken)))
        }
    };
    response.body(body).expect("the test's reply is valid HTTP")
}
