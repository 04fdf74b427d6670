//! Generates the protobuf types from ../proto and the socket marks from ../proto/marks.toml.

use std::{env, fmt::Write as _, fs, path::PathBuf};

const PROTOS: [&str; 3] = ["node.proto", "workload.proto", "authorization.proto"];

/// The one well-known type in use: Debian's protobuf-compiler comes without the files of the well-known types.
const WRAPPERS: &str =
    "syntax = \"proto3\";\npackage google.protobuf;\nmessage UInt32Value { uint32 value = 1; }\n";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let wrappers = out.join("include/google/protobuf");
    fs::create_dir_all(&wrappers)?;
    fs::write(wrappers.join("wrappers.proto"), WRAPPERS)?;
    let files: Vec<PathBuf> = PROTOS.iter().map(|name| protos.join(name)).collect();
    prost_build::Config::new().bytes(["."]).compile_protos(&files, &[protos.clone(), out.join("include")])?;

    let marks = protos.join("marks.toml");
    fs::write(out.join("marks.rs"), marks_source(&fs::read_to_string(&marks)?)?)?;
    for path in files.iter().chain([&marks]) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    Ok(())
}

/// Rust constants for each `[[mark]]` of the table.
fn marks_source(table: &str) -> Result<String, Box<dyn std::error::Error>> {
    let table: toml::Table = table.parse()?;
    let marks = table["mark"].as_array().ok_or("marks.toml: `mark` is not an array of tables")?;
    let mut source = String::new();
    for mark in marks {
        let name = mark["name"].as_str().ok_or("marks.toml: a mark has no name")?;
        let value = mark["value"].as_integer().ok_or("marks.toml: a mark has no value")?;
        let meaning = mark["meaning"].as_str().unwrap_or_default();
        writeln!(source, "/// {meaning}.\npub const {name}: u32 = {value:#x};")?;
    }
    Ok(source)
}
