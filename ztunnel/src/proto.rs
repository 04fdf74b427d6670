//! The wire formats of proto/, generated at build time.

/// Agent <-> ztunnel.
pub mod node {
    include!(concat!(env!("OUT_DIR"), "/undermesh.node.rs"));
}

/// Workloads and services.
#[allow(clippy::large_enum_variant, reason = "generated; decoded and dropped at once")]
pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
}

/// L4 policies.
pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}
