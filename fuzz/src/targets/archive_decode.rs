//! Any bytes as an archive: no panic, no more memory than a small multiple of the input, and what can be read can be written so
//! that it is read the same.

use super::memory::bounded;
use crate::archive::{Archive, Data, HEADER_LEN, Header, NodeId, SeekTable, decode, encode};
use crate::units::Digest;

pub fn run(input: &[u8]) {
    // As a file: the header says where the rest lies.
    if let Ok(header) = Header::decode(input)
        && header.check(input.len() as u64).is_ok()
    {
        let part = |(pos, len): (u64, u64)| &input[pos as usize..(pos + len) as usize];
        check(&input[..HEADER_LEN], part(header.index), part(header.storage_info));
    }
    // As the parts behind a header that fits, so that no mutation is lost on positions.
    if let [split, parts @ ..] = input
        && !parts.is_empty()
    {
        let (index, info) = parts.split_at(1 + usize::from(*split) * (parts.len() - 1) / 255);
        let header = Header {
            index: (HEADER_LEN as u64, index.len() as u64),
            storage_info: ((HEADER_LEN + index.len()) as u64, info.len() as u64),
            storage_type: String::new(),
        };
        check(&header.encode(), index, info);
    }
}

fn check(header: &[u8], index: &[u8], info: &[u8]) {
    let bytes = header.len() + index.len() + info.len();
    let index = &sealed(header, index, info)[..];
    if let Ok(archive) = bounded(bytes, || decode(header, index, info)) {
        walk(&archive);
        write_and_read(archive);
    }
}

/// The index with the digest of what it is now, where it has one: else no mutation would get past it.
fn sealed(header: &[u8], index: &[u8], info: &[u8]) -> Vec<u8> {
    const MARK: &[u8] = b"clip-csi-metadata:";
    let mut index = index.to_vec();
    let head = &index[..index.len().min(16 << 10)];
    if let Some(at) = head.windows(MARK.len()).position(|text| text == MARK)
        && let Some(digits) = index.get_mut(at + MARK.len()..at + MARK.len() + 64)
    {
        digits.fill(b'0');
        let digest = Digest::of(&[header, &index, info].concat());
        index[at + MARK.len()..][..64].copy_from_slice(digest.hex().as_bytes());
    }
    index
}

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

fn write_and_read(archive: Archive) {
    let Archive { storage, tree, extension, .. } = archive;
    let extension = extension.unwrap_or_default();
    let written = encode(&tree, &storage, extension.clone(), &SeekTable::default(), HEADER_LEN as u64)
        .expect("what was read can be written");
    let header = Header::decode(&written.header).expect("our own header");
    let part = |(pos, len): (u64, u64)| {
        let from = (pos as usize).saturating_sub(HEADER_LEN);
        &written.tail[from..from + len as usize]
    };
    let again = decode(&written.header, part(header.index), part(header.storage_info)).expect("our own archive");
    assert!(again.tree == tree, "another tree");
    assert_eq!(again.storage, storage);
    assert_eq!(again.extension, Some(extension));
}
