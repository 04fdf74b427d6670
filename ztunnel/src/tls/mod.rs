//! TLS 1.3 between workloads: certificates per identity, trust bundle, and the configurations made from them.
//!
//! No SNI, no session resumption, no early data; AES-GCM only; the hybrid post-quantum key exchange is preferred.

mod store;
mod verify;

pub use store::{CertificateInfo, Credentials, Invalid, Unusable};
pub use verify::{describe, peer_identity};

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The only protocol spoken inside a tunnel.
pub const ALPN_H2: &[u8] = b"h2";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}
