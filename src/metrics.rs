//! Every metric: name, unit, labels. One table; label values come from closed sets, so the series are bounded.

use std::sync::LazyLock;

use prometheus::{
    Counter, Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

/// Seconds, from a warm publish (1 ms) to a large build (20 min).
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0];

macro_rules! metrics {
    ($( $field:ident: $kind:ident($name:literal, $help:literal $(, [$($label:literal),+])?); )+) => {
        /// The process's metrics.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $( #[doc = concat!("`", $name, "`: ", $help)] pub $field: $kind, )+
        }

        impl Metrics {
            fn new() -> prometheus::Result<Self> {
                let registry = Registry::new();
                $(
                    let $field = make::$kind($name, $help, &[$($($label),+)?])?;
                    registry.register(Box::new($field.clone()))?;
                )+
                Ok(Self { registry, $( $field, )+ })
            }
        }

        /// Name and help of every metric, for the documentation and its test.
        pub const TABLE: &[(&str, &str)] = &[$( ($name, $help), )+];
    };
}

#[allow(non_snake_case)]
mod make {
    use super::*;
    pub(super) fn IntCounter(name: &str, help: &str, _: &[&str]) -> prometheus::Result<super::IntCounter> {
        super::IntCounter::new(name, help)
    }
    pub(super) fn Counter(name: &str, help: &str, _: &[&str]) -> prometheus::Result<super::Counter> {
        super::Counter::new(name, help)
    }
    pub(super) fn Gauge(name: &str, help: &str, _: &[&str]) -> prometheus::Result<super::Gauge> {
        super::Gauge::new(name, help)
    }
    pub(super) fn IntCounterVec(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<super::IntCounterVec> {
        super::IntCounterVec::new(Opts::new(name, help), labels)
    }
    pub(super) fn Histogram(name: &str, help: &str, _: &[&str]) -> prometheus::Result<super::Histogram> {
        super::Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()))
    }
    pub(super) fn HistogramVec(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<super::HistogramVec> {
        super::HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels)
    }
}

metrics! {
    rpc_seconds: HistogramVec("clip_rpc_seconds", "CSI calls: duration in seconds by method and gRPC code", ["method", "code"]);
    publishes: IntCounterVec("clip_publishes_total", "NodePublishVolume calls by result (ok, error) and archive version (v1, v2, none)", ["result", "version"]);
    open_mounts: Gauge("clip_open_mounts", "FUSE mounts that are being served");
    bound_targets: Gauge("clip_bound_targets", "Target paths that are bound to a mount");
    reads: IntCounterVec("clip_reads_total", "Read requests by cache result (hit, miss)", ["cache"]);
    read_bytes: IntCounter("clip_read_bytes_total", "Bytes given to readers");
    unverified_read_bytes: IntCounter("clip_unverified_read_bytes_total", "Bytes given to readers that no digest covers");
    first_read_seconds: Histogram("clip_first_read_seconds", "From the publish of a volume to the first byte read from its mount, in seconds");
    range_gets: IntCounterVec("clip_range_gets_total", "Range requests by source (file, s3, registry)", ["source"]);
    range_get_bytes: IntCounterVec("clip_range_get_bytes_total", "Bytes fetched by range requests by source (file, s3, registry)", ["source"]);
    fetch_retries: IntCounterVec("clip_fetch_retries_total", "Requests tried again by source (file, s3, registry)", ["source"]);
    inflate_cpu_seconds: Counter("clip_inflate_cpu_seconds_total", "Seconds spent inflating spans for readers");
    cache_used_bytes: Gauge("clip_cache_used_bytes", "Disk space that the cache holds in bytes");
    cache_evicted_bytes: IntCounter("clip_cache_evicted_bytes_total", "Bytes evicted from the cache");
    cache_uncached_reads: IntCounter("clip_cache_uncached_reads_total", "Fills that could not be stored (no space, I/O error) and were served uncached");
    index_build_seconds: Histogram("clip_index_build_seconds", "Building a v2 index: duration in seconds");
    index_bytes: IntCounter("clip_index_bytes_total", "Bytes of v2 archives built");
    v1_extract_seconds: Histogram("clip_v1_extract_seconds", "Unpacking an image for a v1 archive: duration in seconds");
    v1_archive_bytes: IntCounter("clip_v1_archive_bytes_total", "Bytes of v1 archives built");
    build_fallbacks: IntCounter("clip_build_fallbacks_total", "Builds that were to be v2 and fell back to v1");
    referrer_lookups: IntCounterVec("clip_referrer_lookups_total", "Searches for an archive beside an image by result (found, none, rejected, error)", ["result"]);
    archives_collected: IntCounter("clip_archives_collected_total", "Archives removed from the archive store because no volume named them");
    events: IntCounterVec("clip_events_total", "Kubernetes Events by result (published, failed, dropped)", ["result"]);
    startup_taint: IntCounterVec("clip_startup_taint_total", "Tries to remove the node's startup taint by result (removed, absent, error)", ["result"]);
    kube_errors: IntCounterVec("clip_kube_errors_total", "Failed calls to the Kubernetes API by kind (denied, conflict, unavailable, invalid)", ["kind"]);
    errors: IntCounterVec("clip_errors_total", "Errors by kind (not_found, denied, refused, unavailable, corrupt, invalid, io, unverifiable)", ["kind"]);
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| match Metrics::new() {
    Ok(metrics) => metrics,
    // Names and labels are literals of this file; `every_metric_registers` proves that they are accepted.
    Err(error) => unreachable!("a metric of the table is refused: {error}"),
});

/// The process's metrics.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

/// All metrics in the Prometheus text format.
pub fn render() -> Result<Vec<u8>, prometheus::Error> {
    let mut out = Vec::new();
    TextEncoder::new().encode(&METRICS.registry.gather(), &mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_registers_under_its_name() {
        metrics().errors.with_label_values(&["io"]).inc();
        let text = String::from_utf8(render().unwrap()).unwrap();
        assert!(text.contains("clip_errors_total{kind=\"io\"}"), "{text}");
        assert!(TABLE.iter().all(|(name, help)| name.starts_with("clip_") && !help.is_empty()));
    }
}
