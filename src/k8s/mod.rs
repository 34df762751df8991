//! The Kubernetes API, as far as the driver asks it something.

pub mod release;
