//! The socket marks of undermesh, from proto/marks.toml.

include!(concat!(env!("OUT_DIR"), "/marks.rs"));
