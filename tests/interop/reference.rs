//! The Go module as a program (`main.go`), and what is known to be wrong with it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use clip_csi::units::Digest;

use crate::common::node::unmount_below;
use crate::common::skip::{no_fuse, no_go, skipped};
use crate::common::tree::{Facts, walk};

/// What a tree shows.
pub type Seen = BTreeMap<PathBuf, Facts>;

/// The program, built once per run, or why it can't be. A Go that fails to build it is a failure.
static PROGRAM: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    no_go().map_or(Ok(()), Err)?;
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("interop_reference");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(".").current_dir(source).env("GOTOOLCHAIN", "local");
    succeeded(&build.output().expect("go build can be started"), "go build");
    Ok(program)
});

/// The Go module.
#[derive(Debug, Clone, Copy)]
pub struct Reference(&'static Path);

impl Reference {
    /// The reference, or a note that the running test is skipped for want of Go, root, /dev/fuse or one of `tools`.
    pub fn or_skip(tools: &[&str]) -> Option<Self> {
        let there = |tool: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
        };
        let mut missing: Vec<String> =
            tools.iter().filter(|tool| !there(tool)).map(|tool| format!("{tool} is not installed")).collect();
        missing.extend(no_fuse().map(str::to_owned));
        // Built only where it will be used.
        if missing.is_empty() {
            match PROGRAM.as_deref().map_err(String::as_str) {
                Ok(program) => return Some(Self(program)),
                Err(why) => missing.push(why.to_owned()),
            }
        }
        // The harness names a test's thread after it.
        skipped(std::thread::current().name().unwrap_or("interop"), &missing.join("; "));
        None
    }

    /// The program with a verb, to be run in another way than those below.
    pub fn command(self, verb: &str) -> Command {
        let mut command = Command::new(self.0);
        command.arg(verb);
        command
    }

    /// Runs a verb to its end.
    pub fn run<const N: usize>(self, verb: &str, args: [&Path; N]) {
        let output = Command::new(self.0).arg(verb).args(args).output().expect("the reference can be started");
        succeeded(&output, &format!("reference {verb} {args:?}"));
    }

    /// Mounts an archive on `dir`, which it makes, with `cache` for the layers of an image.
    pub fn mount(self, archive: &Path, dir: &Path, cache: &Path) -> Mounted {
        self.mount_with(Command::new(self.0).arg("mount").args([archive, dir, cache]), dir)
    }

    /// Mounts an index whose data is in S3.
    pub fn mount_s3(self, archive: &Path, dir: &Path, access_key: &str, secret_key: &str) -> Mounted {
        let mut command = Command::new(self.0);
        command.arg("mount").args([archive, dir]);
        command.env("AWS_ACCESS_KEY_ID", access_key).env("AWS_SECRET_ACCESS_KEY", secret_key);
        // With a `ping` that reaches the internet over IPv6, it dials every endpoint, 127.0.0.1 too, over IPv6 only.
        command.env("PATH", "/nonexistent");
        // It passes the SDK a client of its own, which the SDK refuses to combine with this.
        command.env_remove("AWS_CA_BUNDLE");
        self.mount_with(&mut command, dir)
    }

    fn mount_with(self, command: &mut Command, dir: &Path) -> Mounted {
        // go-fuse logs each kind of request that it does not know: for the eye only where something fails.
        let mut log = tempfile::tempfile().expect("a temporary file");
        let stderr = log.try_clone().expect("a descriptor");
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().expect("the reference can be started");
        let out = child.stdout.take().expect("it is piped");
        let mounted = Mounted { child, dir: dir.to_owned() };
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("its output can be read");
        if line != "ready\n" {
            let mut why = String::new();
            log.rewind().and_then(|()| log.read_to_string(&mut why)).expect("its log can be read");
            panic!("the reference does not mount {}: {why}", dir.display());
        }
        mounted
    }
}

fn succeeded(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A mount of the Go module; ends with this guard.
#[derive(Debug)]
pub struct Mounted {
    child: Child,
    pub dir: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Detached first, the connection ends with the process, and nobody waits for the other.
        unmount_below(&self.dir);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs our command to its end.
pub fn clip_csi(args: &[&str]) {
    let out = Command::new(crate::common::binary()).args(args).output().expect("clip-csi can be started");
    succeeded(&out, &format!("clip-csi {args:?}"));
}

/// A tree whose root no layer describes: its time is whatever an unpacker makes of it.
pub fn without_root_time(mut tree: Seen) -> Seen {
    tree.get_mut(Path::new("")).expect("every tree has a root").mtime = (0, 0);
    tree
}

/// A tree that the reference extracted after `since`, which all its times must prove; they are 0 here.
pub fn extracted(dir: &Path, since: SystemTime) -> Seen {
    let since = since.duration_since(UNIX_EPOCH).expect("a clock that is set").as_secs() as i64;
    let mut tree = walk(dir);
    for (path, facts) in &mut tree {
        assert!(facts.mtime.0 >= since, "{} was extracted with a time: {:?}", path.display(), facts.mtime);
        facts.mtime = (0, 0);
    }
    tree
}

/// Something that the reference gets wrong: what it makes of a tree that is right.
#[derive(Debug, Clone, Copy)]
pub struct Defect {
    pub name: &'static str,
    pub of: fn(&mut Seen),
}

/// The tree as these defects show it. Each must change something: an exception that nothing here needs is no exception,
/// and the comparison that follows fails as soon as the reference has one of them no more.
pub fn with_defects(mut tree: Seen, defects: &[Defect]) -> Seen {
    for defect in defects {
        let before = tree.clone();
        (defect.of)(&mut tree);
        assert_ne!(tree, before, "{}: nothing in this tree shows it", defect.name);
    }
    tree
}

fn each(tree: &mut Seen, change: impl Fn(&mut Facts)) {
    tree.values_mut().for_each(change);
}

/// Its archiver and its indexer.
pub const SPECIAL_BITS_ARE_LOST: Defect =
    Defect { name: "setuid, setgid and sticky are lost", of: |tree| each(tree, |facts| facts.mode &= 0o777) };

/// Its archiver; its extractor too.
pub const HARD_LINKS_ARE_COPIES: Defect = Defect {
    name: "hard links become files of their own",
    of: |tree| each(tree, |facts| facts.nlink = facts.nlink.min(1)),
};

/// Its archiver, its indexer, its mounts and its extractor.
pub const XATTRS_ARE_LOST: Defect =
    Defect { name: "xattrs are lost", of: |tree| each(tree, |facts| facts.xattrs.clear()) };

/// Its mounts of our archives: the number is in our extension.
pub const DEVICE_NUMBERS_ARE_LOST: Defect =
    Defect { name: "device nodes have no number", of: |tree| each(tree, |facts| facts.rdev = 0) };

/// Its archiver.
pub const DEVICES_ARE_DROPPED: Defect = Defect {
    name: "device nodes are dropped",
    of: |tree| tree.retain(|_, facts| !matches!(facts.kind, "char device" | "block device")),
};

/// Its indexer.
pub const SPECIAL_FILES_ARE_DROPPED: Defect = Defect {
    name: "fifos, sockets and device nodes are dropped",
    of: |tree| tree.retain(|_, facts| matches!(facts.kind, "dir" | "file" | "symlink")),
};

/// Its mounts: LOOKUP answers with nanoseconds, GETATTR without, so that the root never has any, and another name only
/// until the kernel asks again. The oracle without those that are lost; the seconds must be there.
pub fn with_lost_nanoseconds(mut oracle: Seen, shown: &Seen) -> Seen {
    assert_eq!(shown[Path::new("")].mtime.1, 0, "the root's nanoseconds are lost");
    for (path, facts) in &mut oracle {
        if shown.get(path).is_some_and(|shown| shown.mtime.1 == 0) {
            facts.mtime.1 = 0;
        }
    }
    oracle
}

/// Its extractor.
pub const SPECIAL_FILES_ARE_EXTRACTED_AS_EMPTY_FILES: Defect = Defect {
    name: "fifos, sockets and device nodes are extracted as empty files",
    of: |tree| {
        each(tree, |facts| {
            if !matches!(facts.kind, "dir" | "file" | "symlink") {
                (facts.kind, facts.content, facts.rdev) = ("file", Some(Digest::of(b"")), 0);
            }
        });
    },
};

/// Its extractor.
pub const OWNERS_ARE_NOT_EXTRACTED: Defect = Defect {
    name: "what is extracted belongs to who extracts",
    of: |tree| each(tree, |facts| (facts.uid, facts.gid) = (0, 0)),
};

/// Its extractor.
pub const MODES_OF_FILES_ARE_NOT_EXTRACTED: Defect = Defect {
    name: "extracted files have the mode 666 less the umask",
    of: |tree| {
        each(tree, |facts| {
            if facts.kind == "file" {
                facts.mode = 0o666;
            }
        });
    },
};

/// Its extractor.
pub const TIMES_ARE_NOT_EXTRACTED: Defect = Defect {
    name: "what is extracted has the time of the extraction",
    of: |tree| each(tree, |facts| facts.mtime = (0, 0)),
};

/// What its extractor loses.
pub const EXTRACTION: &[Defect] = &[
    SPECIAL_FILES_ARE_EXTRACTED_AS_EMPTY_FILES,
    SPECIAL_BITS_ARE_LOST,
    HARD_LINKS_ARE_COPIES,
    OWNERS_ARE_NOT_EXTRACTED,
    MODES_OF_FILES_ARE_NOT_EXTRACTED,
    TIMES_ARE_NOT_EXTRACTED,
];
