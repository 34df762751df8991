//! Tests that need what a machine may lack (a tool, root, /dev/fuse) say so by name instead of failing or passing silently.

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

/// The same, of the test that is running: the harness names a test's thread after it.
#[allow(dead_code)]
pub fn skipped_here(reason: &str) {
    skipped(std::thread::current().name().unwrap_or("a test"), reason);
}

/// Why nothing can be mounted here; `None` where it can. Asks the kernel, so a root without the capability is told apart.
#[allow(dead_code)]
pub fn no_mounts() -> Option<&'static str> {
    let asked = rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC);
    asked.is_err().then_some("it takes root, and the right to mount")
}

/// Why no FUSE filesystem can be mounted here; `None` where it can.
#[allow(dead_code)]
pub fn no_fuse() -> Option<&'static str> {
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
    no_mounts().or_else(|| device.is_err().then_some("it takes a /dev/fuse that opens"))
}

/// Why no Go program of a test can be built here; `None` where it can. A Go that has all it needs and fails is no reason.
#[allow(dead_code)]
pub fn no_go() -> Option<String> {
    let asked = std::process::Command::new("go").args(["env", "GOCACHE"]).output();
    let Some(output) = asked.ok().filter(|output| output.status.success()) else {
        return Some("no Go toolchain".into());
    };
    let cache = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let writable = |dir: &str| std::fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir)).is_ok();
    let places = [Some(cache.as_str()), option_env!("CARGO_TARGET_TMPDIR")];
    let shut = places.into_iter().flatten().find(|dir| !writable(dir));
    shut.map(|dir| format!("Go builds into {dir}, which can't be written to"))
}

/// Ends the running test here, noted as skipped under its own name, unless all of this is there: `fuse` (a FUSE filesystem can be
/// mounted), `go` (a Go program can be built), a program on the PATH by its name. A test file that uses it has this module as
/// `skip` at its root.
#[allow(unused_macros)]
macro_rules! needs {
    (@ $here:ident fuse) => {
        $crate::skip::lacks_fuse($here)
    };
    (@ $here:ident go) => {
        $crate::skip::lacks_go($here)
    };
    (@ $here:ident $program:literal) => {
        $crate::skip::lacks($here, &[$program])
    };
    ($($what:tt),+) => {{
        fn here() {}
        let here = std::any::type_name_of_val(&here);
        if $($crate::skip::needs!(@ here $what))||+ {
            return;
        }
    }};
}
#[allow(unused_imports)]
pub(crate) use needs;

/// The name of a test, by the type name of a function `here` inside of it.
fn name(here: &str) -> &str {
    here.trim_end_matches("::here").trim_end_matches("::{{closure}}")
}

/// Notes a skip where no FUSE filesystem can be mounted. `here`: as for [`lacks`].
#[allow(dead_code)]
pub fn lacks_fuse(here: &str) -> bool {
    no_fuse().inspect(|why| skipped(name(here), why)).is_some()
}

/// Notes a skip where no Go program can be built. `here`: as for [`lacks`].
#[allow(dead_code)]
pub fn lacks_go(here: &str) -> bool {
    no_go().inspect(|why| skipped(name(here), why)).is_some()
}

/// Notes a skip where one of the programs is missing. `here`: the type name of a function inside the test, or what is skipped.
#[allow(dead_code)]
pub fn lacks(here: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| !installed(program));
    missing.inspect(|program| skipped(name(here), &format!("{program} is not installed"))).is_some()
}

/// Whether a program is on the PATH.
#[allow(dead_code)]
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
