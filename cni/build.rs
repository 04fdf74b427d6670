//! Generates the protobuf types from ../proto/cni.proto.

use std::{env, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../proto");
    let file = protos.join("cni.proto");
    prost_build::compile_protos(&[&file], &[&protos])?;
    println!("cargo:rerun-if-changed={}", file.display());
    Ok(())
}
