//! Compiles proto/*.proto with protox (no system protoc) into servers and clients, and keeps the descriptors for the wire test.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(["csi.proto", "pluginregistration.proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let descriptors = compiler.include_source_info(true).file_descriptor_set();
    // Messages with secrets (or tokens in a volume context) must not print them: src/csi/proto.rs has their Debug.
    let secretive: Vec<String> = descriptors
        .file
        .iter()
        .flat_map(|file| file.message_type.iter().map(move |message| (file.package(), message)))
        .filter(|(_, message)| message.field.iter().any(|field| field.name() == "secrets"))
        .map(|(package, message)| format!(".{package}.{}", message.name()))
        .collect();
    tonic_prost_build::configure().generate_default_stubs(true).skip_debug(secretive).compile_fds(descriptors)?;
    Ok(())
}
