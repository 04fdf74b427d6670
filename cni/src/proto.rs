//! The wire format between plugin and agent, generated from proto/cni.proto.

include!(concat!(env!("OUT_DIR"), "/undermesh.cni.rs"));
