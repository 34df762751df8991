//! Any bytes as storage info, whole or inside a wrapper of ours: bounded, and the same when written and read again.

use super::memory::bounded;
use crate::archive::Storage;
use crate::archive::gob::{Define, Encoder, TypeId};

pub fn run(input: &[u8]) {
    check(input);
    let [kind, data @ ..] = input else { return };
    let mut encoder = Encoder::default();
    let (id, fields) = (TypeId(64), [("Type", TypeId::STRING), ("Data", TypeId::BYTES)]);
    encoder.define(id, "StorageInfoWrapper", Define::Struct(&fields));
    encoder.structure(id, |fields| {
        fields.bytes(0, if kind % 4 == 0 { b"s3" } else { b"oci" });
        fields.bytes(1, data);
    });
    check(&encoder.finish());
}

fn check(bytes: &[u8]) {
    let Ok(storage) = bounded(bytes.len(), || Storage::decode(bytes)) else { return };
    let again = Storage::decode(&storage.encode()).expect("our own storage info");
    assert_eq!(again, storage);
}
