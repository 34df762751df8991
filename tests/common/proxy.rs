//! A TCP proxy that counts what comes back through it: how much was fetched, whatever the protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Lives as long as this guard.
#[derive(Debug)]
pub struct Proxy {
    host: String,
    bytes: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// In front of `to`, a `host:port`.
    pub async fn start(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let host = listener.local_addr().expect("an address").to_string();
        let bytes = Arc::new(AtomicU64::new(0));
        let (to, counted) = (to.to_owned(), bytes.clone());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (to, counted) = (to.clone(), counted.clone());
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(&to).await else { return };
                    let (mut client_in, mut client_out) = client.into_split();
                    let (mut server_in, mut server_out) = server.into_split();
                    let up = tokio::spawn(async move {
                        let _ = tokio::io::copy(&mut client_in, &mut server_out).await;
                        let _ = server_out.shutdown().await;
                    });
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(n @ 1..) = server_in.read(&mut buffer).await {
                        counted.fetch_add(n as u64, Ordering::SeqCst);
                        if client_out.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                    }
                    let _ = client_out.shutdown().await;
                    up.abort();
                });
            }
        });
        Self { host, bytes, task }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Bytes from the server to its clients since the last call, headers included.
    pub fn take(&self) -> u64 {
        self.bytes.swap(0, Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}
