//! Our proto/ against the published CSI 1.12 and kubelet registration protocols: every name, number, type and oneof.
//!
//! tests/csi_wire/facts.txt is what tests/csi_wire/main.go prints of the published Go packages (versions in its go.mod).

use std::path::Path;
use std::process::Command;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};
use skip::needs;

#[path = "common/skip.rs"]
mod skip;

const FACTS: &str = include_str!("csi_wire/facts.txt");

/// The same lines as the Go program's, of our descriptors.
fn ours() -> Vec<String> {
    let set = FileDescriptorSet::decode(clip_csi::csi::proto::DESCRIPTORS).unwrap();
    let mut lines = Vec::new();
    for file in set.file.iter().filter(|file| file.package() != "google.protobuf") {
        for service in &file.service {
            for method in &service.method {
                lines.push(format!(
                    "rpc {}.{}.{} {} -> {} streams {} {}",
                    file.package(),
                    service.name(),
                    method.name(),
                    method.input_type().trim_start_matches('.'),
                    method.output_type().trim_start_matches('.'),
                    method.client_streaming(),
                    method.server_streaming(),
                ));
            }
        }
        file.message_type.iter().for_each(|message| of_message(file.package(), message, &mut lines));
        file.enum_type.iter().for_each(|one| of_enum(file.package(), one, &mut lines));
    }
    lines.sort();
    lines
}

fn of_message(scope: &str, message: &DescriptorProto, lines: &mut Vec<String>) {
    let name = format!("{scope}.{}", message.name());
    if !message.options.as_ref().is_some_and(|options| options.map_entry()) {
        lines.push(format!("message {name}"));
    }
    for field in &message.field {
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
            other => other.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
        };
        let cardinality = match field.label() {
            Label::Repeated => "repeated",
            Label::Optional => "optional",
            Label::Required => "required",
        };
        let oneof = field
            .oneof_index
            .filter(|_| !field.proto3_optional())
            .map_or("-", |index| message.oneof_decl[index as usize].name());
        lines.push(format!("field {name}.{} = {} {cardinality} {kind} oneof {oneof}", field.name(), field.number()));
    }
    message.nested_type.iter().for_each(|nested| of_message(&name, nested, lines));
    message.enum_type.iter().for_each(|nested| of_enum(&name, nested, lines));
}

fn of_enum(scope: &str, one: &EnumDescriptorProto, lines: &mut Vec<String>) {
    for value in &one.value {
        lines.push(format!("value {scope}.{}.{} = {}", one.name(), value.name(), value.number()));
    }
}

#[test]
fn our_protocol_is_csi_1_12_to_the_last_number() {
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours(), FACTS.lines().map(str::to_owned).collect());
    let missing: Vec<_> = theirs.iter().filter(|line| !ours.contains(line)).collect();
    let extra: Vec<_> = ours.iter().filter(|line| !theirs.contains(line)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nextra: {extra:#?}");
    assert!(theirs.len() > 350, "the facts are all there");
}

/// Runs the Go program where Go is (and its modules can be had), so that the kept facts are not just ours.
#[test]
fn the_facts_are_those_of_the_published_go_packages() {
    needs!("go");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/csi_wire");
    // An older Go is no reason to download another one.
    let go =
        |arguments: &[&str]| Command::new("go").args(arguments).current_dir(&dir).env("GOTOOLCHAIN", "local").output();
    let download = go(&["mod", "download"]).unwrap();
    if !download.status.success() {
        let said = String::from_utf8_lossy(&download.stderr).replace('\n', " ");
        return skip::skipped("the_facts_are_those_of_the_published_go_packages", &format!("go mod download: {said}"));
    }
    let output = go(&["run", "."]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), FACTS, "run `go run . > facts.txt` in tests/csi_wire");
}
