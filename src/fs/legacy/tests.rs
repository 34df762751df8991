use super::*;
use crate::archive::{Entry, TreeBuilder};
use crate::source::SourceError;
use crate::source::fake::{FakeSource, Fault, FaultySource};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A cache without disk: spans that the filler brought, as the real one keeps them.
#[derive(Debug)]
struct MemoryCache {
    bounds: Arc<[u64]>,
    filler: Arc<WholeFileFiller>,
    spans: Mutex<BTreeMap<u32, Bytes>>,
}

impl MemoryCache {
    fn evict_all(&self) {
        self.spans.lock().unwrap().clear();
    }
    fn get(&self, range: Range<u64>) -> Option<Vec<u8>> {
        let spans = self.spans.lock().unwrap();
        let mut out = Vec::new();
        for ix in self.filler.geometry.spans_of(&range) {
            let bytes = spans.get(&ix)?;
            let start = self.bounds[ix as usize];
            let from = range.start.max(start) - start;
            let to = range.end.min(start + bytes.len() as u64) - start;
            out.extend_from_slice(&bytes[from as usize..to as usize]);
        }
        Some(out)
    }
}

#[async_trait]
impl Blob for MemoryCache {
    fn try_read(&self, off: u64, buf: &mut [u8]) -> bool {
        match self.get(off..off + buf.len() as u64) {
            Some(bytes) => {
                buf.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }
    async fn read(&self, off: u64, len: usize) -> Result<Bytes, CacheError> {
        let range = off..off + len as u64;
        for ix in self.filler.geometry.spans_of(&range) {
            if !self.spans.lock().unwrap().contains_key(&ix) {
                let filled = self.filler.fill(ix..ix + 1).await?.remove(0);
                self.spans.lock().unwrap().insert(ix, filled.bytes);
            }
        }
        Ok(self.get(range).unwrap().into())
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Has {
    Hash,
    CrcOnly,
}

/// An archive as the Go module lays it out: header, records, index (here: filler bytes).
fn archive(sizes: &[usize], has: Has) -> (Vec<u8>, Arc<Tree>, Vec<Range<u64>>) {
    let mut bytes = vec![0xee; 54];
    let mut builder = TreeBuilder::default();
    let mut ranges = Vec::new();
    for (i, size) in sizes.iter().enumerate() {
        bytes.push(0);
        let offset = bytes.len() as u64;
        let data: Vec<u8> = (0..*size).map(|b| (b * 31 + b / 256 + i) as u8).collect();
        bytes.extend_from_slice(&data);
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64GoIso, &data);
        bytes.extend_from_slice(&crc.to_be_bytes());
        ranges.push(offset..offset + *size as u64);
        let content_hash = (has == Has::Hash).then(|| Digest::of(&data));
        builder.insert(
            format!("/{i:03}").as_bytes(),
            Entry { size: *size as u64, offset, content_hash, ..Entry::new(Kind::File, 0o644) },
        );
    }
    bytes.extend_from_slice(&[0xdd; 1000]);
    (bytes, Arc::new(builder.finish().unwrap()), ranges)
}

struct Fixture {
    blob: LegacyBlob,
    cache: Arc<MemoryCache>,
    source: Arc<FaultySource>,
    fake: Arc<FakeSource>,
    ranges: Vec<Range<u64>>,
    bytes: Vec<u8>,
}

fn fixture_of(bytes: Vec<u8>, tree: Arc<Tree>, ranges: Vec<Range<u64>>, integrity: Integrity) -> Fixture {
    let fake = FakeSource::new("the archive", bytes.clone());
    let source = FaultySource::new(Arc::clone(&fake) as Arc<dyn BlobSource>, []);
    let filler = WholeFileFiller::new(tree, Arc::clone(&source) as _, bytes.len() as u64).unwrap();
    let filler = Arc::new(filler);
    let bounds = Arc::clone(&filler.geometry.bounds);
    let cache = Arc::new(MemoryCache { bounds, filler: Arc::clone(&filler), spans: Mutex::default() });
    let blob = LegacyBlob::new(Arc::clone(&cache) as Arc<dyn Blob>, filler, integrity);
    Fixture { blob, cache, source, fake, ranges, bytes }
}

fn fixture(sizes: &[usize], has: Has, integrity: Integrity) -> Fixture {
    let (bytes, tree, ranges) = archive(sizes, has);
    fixture_of(bytes, tree, ranges, integrity)
}

impl Fixture {
    async fn read(&self, range: Range<u64>) -> Result<Bytes, CacheError> {
        self.blob.read(range.start, (range.end - range.start) as usize).await
    }
    async fn read_file(&self, file: usize) -> Result<Bytes, CacheError> {
        self.read(self.ranges[file].clone()).await
    }
    fn content(&self, range: Range<u64>) -> &[u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }
    /// Bytes of a range that would be counted as unverified.
    fn unverified(&self, range: Range<u64>) -> u64 {
        let geometry = &self.blob.filler.geometry;
        let unproven = geometry.spread_in(&range).filter(|f| !self.blob.is_proven(*f));
        unproven.map(|f| geometry.spread[f].overlap(&range)).sum()
    }
}

const BIG: usize = 3 << 20;

#[tokio::test]
async fn small_files_are_verified_by_hash_or_checksum_and_share_requests() {
    for has in [Has::Hash, Has::CrcOnly] {
        let f = fixture(&[1000, 200_000, 1, 300_000], has, Integrity::Digest);
        for file in 0..4 {
            assert_eq!(f.read_file(file).await.unwrap(), f.content(f.ranges[file].clone()));
            assert_eq!(f.unverified(f.ranges[file].clone()), 0);
        }
        assert_eq!(f.fake.requests(), 1, "{has:?}");
    }
}

#[tokio::test]
async fn a_damaged_small_file_is_never_served_and_does_not_take_its_neighbours_down() {
    for has in [Has::Hash, Has::CrcOnly] {
        let f = fixture(&[1000, 2000, 3000], has, Integrity::Digest);
        f.source.always(Fault::Flip(f.ranges[1].start + 500));
        let error = f.read_file(1).await.unwrap_err();
        assert!(matches!(&error, CacheError::Corrupt { what, .. } if what.contains("/001")), "{error}");
        for file in [0, 2] {
            assert_eq!(f.read_file(file).await.unwrap(), f.content(f.ranges[file].clone()));
            assert_eq!(f.read(f.ranges[file].start + 10..f.ranges[file].start + 20).await.unwrap().len(), 10);
        }
        // Not a part of it either.
        assert!(f.read(f.ranges[1].start..f.ranges[1].start + 10).await.is_err());
        f.source.always(Fault::None);
        assert!(f.read_file(1).await.is_ok());
    }
}

#[tokio::test]
async fn parts_of_large_files_are_served_and_count_as_unverified() {
    let f = fixture(&[1000, BIG, 1000], Has::Hash, Integrity::Digest);
    let part = f.ranges[1].start + 5..f.ranges[1].start + 105;
    assert_eq!(f.read(part.clone()).await.unwrap(), f.content(part.clone()));
    assert_eq!(f.unverified(part), 100);
    assert_eq!(f.unverified(f.ranges[0].clone()), 0);
    // One span, not the file.
    assert!(f.fake.bytes_read() <= SPAN, "{}", f.fake.bytes_read());
}

#[tokio::test]
async fn strict_checks_the_whole_file_before_its_first_byte() {
    for has in [Has::Hash, Has::CrcOnly] {
        let f = fixture(&[1000, BIG, 1000], has, Integrity::Strict);
        let part = f.ranges[1].start + 5..f.ranges[1].start + 105;
        let mut buf = [0; 100];
        assert!(!f.blob.try_read(part.start, &mut buf));
        assert_eq!(f.read(part.clone()).await.unwrap(), f.content(part.clone()));
        assert!(f.fake.bytes_read() >= BIG as u64);
        assert_eq!(f.unverified(part.clone()), 0);
        // Remembered: no more requests.
        let requests = f.fake.requests();
        assert!(f.blob.try_read(part.start, &mut buf));
        assert_eq!(buf, f.content(part));
        assert_eq!(f.fake.requests(), requests);
    }
}

#[tokio::test]
async fn strict_serves_no_byte_of_a_damaged_large_file() {
    for has in [Has::Hash, Has::CrcOnly] {
        let f = fixture(&[1000, BIG, 1000], has, Integrity::Strict);
        // Damage in the last span; the first is asked for.
        f.source.always(Fault::Flip(f.ranges[1].end - 7));
        let part = f.ranges[1].start..f.ranges[1].start + 10;
        for _ in 0..2 {
            assert!(matches!(f.read(part.clone()).await, Err(CacheError::Corrupt { .. })));
            assert!(!f.blob.try_read(part.start, &mut [0; 10]));
        }
        assert!(f.read_file(0).await.is_ok());
    }
}

#[tokio::test]
async fn what_was_proven_holds_for_later_fetches() {
    let f = fixture(&[BIG], Has::Hash, Integrity::Strict);
    let part = f.ranges[0].start..f.ranges[0].start + 10;
    f.read(part.clone()).await.unwrap();
    f.cache.evict_all();
    f.source.always(Fault::Flip(part.start + 1));
    assert!(matches!(f.read(part.clone()).await, Err(CacheError::Corrupt { .. })));
    f.source.always(Fault::None);
    assert!(f.read(part).await.is_ok());
}

#[tokio::test]
async fn strict_refuses_a_large_file_that_nothing_can_check() {
    let (mut bytes, tree, ranges) = archive(&[BIG], Has::CrcOnly);
    // The archive ends with the data: no checksum behind it.
    bytes.truncate(ranges[0].end as usize);
    let f = fixture_of(bytes, tree, ranges, Integrity::Strict);
    assert!(matches!(f.read_file(0).await, Err(CacheError::Unverifiable { .. })));
}

#[tokio::test]
async fn a_failed_fetch_is_told_as_it_is_and_tried_again() {
    let f = fixture(&[1000], Has::Hash, Integrity::Digest);
    f.source.push(Fault::Error(SourceError::Unavailable { what: "x".into(), tries: 3, detail: "lost".into() }));
    assert!(matches!(f.read_file(0).await, Err(CacheError::Source(SourceError::Unavailable { .. }))));
    assert!(f.read_file(0).await.is_ok());
}

#[test]
fn archives_that_claim_other_hashes_or_places_share_nothing() {
    let (bytes, hashed, _) = archive(&[100, 200], Has::Hash);
    let (_, bare, _) = archive(&[100, 200], Has::CrcOnly);
    let (_, other, _) = archive(&[100, 201], Has::Hash);
    let digest = |tree: &Tree| Geometry::new(tree, bytes.len() as u64).unwrap().digest;
    assert_ne!(digest(&hashed), digest(&bare));
    assert_ne!(digest(&hashed), digest(&other));
    assert_eq!(digest(&hashed), digest(&hashed));
}

#[test]
fn an_absurd_length_costs_no_memory() {
    let (_, tree, _) = archive(&[100], Has::Hash);
    assert!(matches!(Geometry::new(&tree, u64::MAX), Err(CacheError::Corrupt { .. })));
}

/// Each of them would have the same bytes hashed once more, at every fill.
#[test]
fn files_that_share_bytes_are_refused_but_for_names_of_the_same() {
    let geometry = |files: &[(u64, u64, Option<&[u8]>)]| {
        let mut builder = TreeBuilder::default();
        for (i, (offset, size, content)) in files.iter().enumerate() {
            let content_hash = content.map(Digest::of);
            let entry = Entry { size: *size, offset: *offset, content_hash, ..Entry::new(Kind::File, 0o644) };
            builder.insert(format!("/{i}").as_bytes(), entry);
        }
        Geometry::new(&builder.finish().unwrap(), 1 << 20)
    };
    let twice = geometry(&[(100, 50, Some(b"x")), (100, 50, Some(b"x")), (200, 50, None)]).unwrap();
    assert_eq!(twice.whole.len(), 2, "checked once");
    for shared in [
        [(100, 50, Some(&b"x"[..])), (100, 50, Some(b"y"))],
        [(100, 50, Some(b"x")), (100, 50, None)],
        [(100, 50, None), (149, 50, None)],
    ] {
        let error = geometry(&shared).unwrap_err().to_string();
        assert!(error.contains("claim the same bytes"), "{error}");
    }
    assert!(geometry(&[(100, 50, None), (150, 50, None)]).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Also where files lie beyond the end.
    #[test]
    fn any_archive_is_cut_into_spans_that_hold_what_they_can(
        gaps in prop::collection::vec((0u64..40_000, prop_oneof![1u64..60_000, 1u64..3_000_000]), 0..40),
        len in 0u64..12_000_000,
    ) {
        let place = |at: &mut u64, (gap, size): &(u64, u64)| {
            let offset = *at + gap;
            *at = offset + size;
            Some((offset, *size))
        };
        let files: Vec<(u64, u64)> = gaps.iter().scan(0, place).collect();
        let mut builder = TreeBuilder::default();
        for (i, (offset, size)) in files.iter().enumerate() {
            let entry = Entry { size: *size, offset: *offset, ..Entry::new(Kind::File, 0o644) };
            builder.insert(format!("/{i}").as_bytes(), entry);
        }
        let g = Geometry::new(&builder.finish().unwrap(), len).unwrap();
        prop_assert_eq!((g.bounds[0], *g.bounds.last().unwrap()), (0, len));
        prop_assert!(g.bounds.windows(2).all(|w| w[0] < w[1] && w[1] - w[0] <= SPAN));
        let span_of = |byte: u64| g.spans_of(&(byte..byte + 1)).start;
        for f in &g.whole {
            prop_assert_eq!(span_of(f.offset), span_of(f.offset + f.len + CRC_LEN - 1));
        }
        prop_assert_eq!(g.whole.len() + g.spread.len(), files.iter().filter(|(o, s)| o + s <= len).count());
        for (at, n) in [(0, len.max(1)), (len / 2, 1), (len / 3, 500_000)] {
            let range = at..at + n;
            let want: Vec<usize> = (0..g.spread.len()).filter(|i| g.spread[*i].overlap(&range) > 0).collect();
            let mut have: Vec<usize> = g.spread_in(&range).collect();
            have.sort_unstable();
            prop_assert_eq!(have, want);
        }
        // Files that do not overlap any other and fit a span lie whole in one.
        let mut sorted: Vec<_> = files.iter().filter(|(o, s)| o + s <= len).collect();
        sorted.sort_unstable();
        if sorted.windows(2).all(|w| w[0].0 + w[0].1 + CRC_LEN < w[1].0) {
            for f in &g.spread {
                prop_assert!(f.len + CRC_LEN + 1 > SPAN || f.offset + f.len + CRC_LEN > len);
            }
        }
    }
}
