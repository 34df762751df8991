//! Arbitrary bytes as an archive: no panic, and no more memory than a small multiple of the input.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use clip_csi::archive::{Archive, Data, Header, NodeId, SeekTable, Storage, decode};
use libfuzzer_sys::fuzz_target;

/// The system's allocator, which keeps the highest number of bytes that were in use at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory but two atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of memory per byte of input. The dearest byte is a path's: two of them (`/d`) imply a directory of some 180 bytes,
/// tables that grow by doubling included.
const PER_BYTE: usize = 128;
/// Tables of fixed size, and the start of every other one.
const BASE: usize = 1 << 20;

/// Walks all of a tree, as a mount would.
fn walk(archive: &Archive) {
    let tree = &archive.tree;
    for id in tree.ids() {
        let path = tree.path(id);
        assert_eq!(tree.resolve(NodeId::ROOT, &path, false), Ok(id));
        let attr = tree.attr(id);
        tree.target(id);
        tree.xattrs(id);
        tree.content_hash(id);
        if let Data::Sparse { extents, .. } = tree.data(id) {
            assert!(extents.iter().all(|extent| extent.offset + extent.len <= attr.size));
        }
        tree.children(id).for_each(|child| assert_eq!(tree.parent(NodeId(child)), id));
    }
}

fuzz_target!(|input: &[u8]| {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    // As a file: the header says where the rest lies.
    if let Ok(header) = Header::decode(input)
        && header.check(input.len() as u64).is_ok()
    {
        let part = |(pos, len): (u64, u64)| &input[pos as usize..(pos + len) as usize];
        if let Ok(archive) = decode(&input[..54], part(header.index), part(header.storage_info)) {
            walk(&archive);
        }
    }
    // As the parts behind a header that fits, so that no mutation is lost on positions.
    if let [split, parts @ ..] = input
        && !parts.is_empty()
    {
        let (index, info) = parts.split_at(1 + usize::from(*split) * (parts.len() - 1) / 255);
        let header = Header {
            index: (54, index.len() as u64),
            storage_info: (54 + index.len() as u64, info.len() as u64),
            storage_type: String::new(),
        };
        if let Ok(archive) = decode(&header.encode(), index, info) {
            walk(&archive);
        }
    }
    let _ = Storage::decode(input);
    if let Ok(table) = SeekTable::decode(input) {
        assert_eq!(SeekTable::decode(&table.encode()).ok().as_ref(), Some(&table));
    }
    let peak = PEAK.load(Relaxed) - before;
    assert!(peak <= PER_BYTE * input.len() + BASE, "{peak} bytes for {} of input", input.len());
});
