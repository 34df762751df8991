//! Any bytes as a header: what is accepted is bounded, and is the same when it is written and read again.

use crate::archive::{HEADER_LEN, Header, MAX_INDEX_LEN, MAX_STORAGE_INFO_LEN};

pub fn run(input: &[u8]) {
    check(input);
    // Behind the magic number and the version, which only luck would find.
    let blank = Header { index: (HEADER_LEN as u64, 1), storage_info: (0, 0), storage_type: String::new() };
    let mut bytes = blank.encode();
    for (to, from) in bytes[10..].iter_mut().zip(input) {
        *to = *from;
    }
    check(&bytes);
}

fn check(bytes: &[u8]) {
    let Ok(header) = Header::decode(bytes) else { return };
    let ends = [header.index, header.storage_info].map(|(pos, len)| {
        assert!(len == 0 || pos >= HEADER_LEN as u64);
        pos.checked_add(len).filter(|end| *end <= i64::MAX as u64).expect("an end that a file may have")
    });
    assert!((1..=MAX_INDEX_LEN).contains(&header.index.1) && header.storage_info.1 <= MAX_STORAGE_INFO_LEN);
    let end = ends[0].max(ends[1]);
    assert!(header.check(end).is_ok() && header.check(end - 1).is_err());
    let again = Header::decode(&header.encode()).expect("our own header");
    assert_eq!((again.index, again.storage_info), (header.index, header.storage_info));
    if header.storage_type.is_ascii() {
        assert_eq!(again.storage_type, header.storage_type);
    }
}
