//! The certificate authorities of this machine. A container image may have none: plain HTTP works all the same, and HTTPS says
//! what is missing.

use std::sync::OnceLock;

/// What to say where nothing can be trusted: the cause, and the remedy.
pub(crate) const NO_ROOTS: &str = "there are no CA certificates here, so no HTTPS server can be trusted; install the package \
    ca-certificates, or name a file of them in SSL_CERT_FILE";

/// Whether there is any CA certificate that can be used, in the places where the TLS libraries look. Looked for once.
pub(crate) fn has_roots() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        rustls::RootCertStore::empty().add_parsable_certificates(found.certs).0 > 0
    })
}

/// What to say of a server's certificate that was refused: `otherwise`, unless there is nothing that could be trusted.
pub(super) fn untrusted(host: &str, otherwise: String) -> String {
    match has_roots() {
        true => otherwise,
        false => format!("the certificate of {host} is not trusted: {NO_ROOTS}"),
    }
}
