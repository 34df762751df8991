//! Tests that need a tool which a machine may lack say so by name instead of failing or passing silently.

use std::io::Write as _;

/// Notes that a test was skipped, and why: on the real stderr, since libtest keeps what `eprintln!` says in a test that
/// passes, and in the file `CLIP_TEST_SKIPS` names; `make test` prints it.
pub fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED: {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    let Some(file) = std::env::var_os("CLIP_TEST_SKIPS") else { return };
    let log = std::fs::OpenOptions::new().append(true).create(true).open(&file);
    log.and_then(|mut log| log.write_all(line.as_bytes())).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
}

/// Ends the running test here, noted as skipped under its own name, unless all these programs are on the PATH.
/// A test file that uses it has this module as `skip` at its root.
#[allow(unused_macros)]
macro_rules! needs {
    ($($program:literal),+) => {{
        fn here() {}
        if $crate::skip::lacks(std::any::type_name_of_val(&here), &[$($program),+]) {
            return;
        }
    }};
}
#[allow(unused_imports)]
pub(crate) use needs;

/// Notes a skip where one of the programs is missing. `here`: the type name of a function inside the test.
#[allow(dead_code)]
pub fn lacks(here: &str, programs: &[&str]) -> bool {
    let test = here.trim_end_matches("::here").trim_end_matches("::{{closure}}");
    let missing = programs.iter().find(|program| !installed(program));
    missing.inspect(|program| skipped(test, &format!("{program} is not installed"))).is_some()
}

/// Whether a program is on the PATH.
#[allow(dead_code)]
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
