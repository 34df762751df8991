//! How long work tells how far it is.

/// Receives progress. The command draws bars, the services write log lines and metrics.
pub trait Progress: Send + Sync {
    /// A piece of work begins: what it is and its total in bytes, where known. The number names it from then on.
    fn begin(&self, what: &str, total: Option<u64>) -> u64;
    /// `bytes` more of it are done.
    fn advance(&self, id: u64, bytes: u64);
    /// It is done.
    fn end(&self, id: u64);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: Option<u64>) -> u64 {
        0
    }
    fn advance(&self, _: u64, _: u64) {}
    fn end(&self, _: u64) {}
}
