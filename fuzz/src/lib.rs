//! The pure modules of clip-csi and what the fuzz targets do with them.

#[path = "../../src"]
mod pure {
    pub mod archive;
    pub mod inflate;
    pub mod units;
    pub mod build {
        pub mod merge;
        pub mod tar;
        pub mod toc;
    }
}

pub mod targets;

pub use pure::{archive, build, inflate, units};
