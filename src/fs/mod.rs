//! The read-only filesystem over an opened archive. Testable without a mount; [`fuse`] is the only kernel adapter.

pub mod blob;
pub mod digest;
pub mod extract;
pub mod fuse;
mod image_fs;
mod legacy;
pub(crate) mod mountinfo;
pub mod open;
mod parts;
mod room;
pub mod verify;

pub use blob::Blob;
pub use digest::{TreeDigest, digest_dir, digest_fs};
pub use extract::{ExtractError, Extracted, extract};
pub use image_fs::{Errno, ImageFs, Integrity, ReadFailure, ReadResult, RootView, Statfs};
pub use open::{OpenError, OpenOptions, Opened, open};
pub use verify::{Verified, verify};
