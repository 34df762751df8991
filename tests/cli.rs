//! The command as people and scripts meet it: help, exit codes, one-line errors, and the whole way over small archives.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

#[path = "common/skip.rs"]
mod skip;

const SUBCOMMANDS: &[&str] = &[
    "index",
    "archive",
    "push",
    "pull",
    "inspect",
    "ls",
    "cat",
    "extract",
    "verify",
    "mount",
    "node",
    "controller",
    "demo",
    "completions",
    "man",
];

/// The command without the caller's configuration.
fn clip() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clip-csi"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CLIP_CSI_") || name.starts_with("B9_") || name.starts_with("AWS_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.env("HOME", "/nonexistent").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    clip().args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Exits with `code` and one line on stderr that holds all of `words`.
#[track_caller]
fn fails(args: &[&str], code: i32, words: &[&str]) {
    let output = run(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(output.stdout.is_empty(), "{args:?}: {}", stdout(&output));
    assert!(text.starts_with("clip-csi: ") && text.trim_end().lines().count() == 1, "one line: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?} should say {word:?}: {text}");
    }
}

/// A directory and a v1 archive of it.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/hello"), "hello, reader\n").unwrap();
        fs::write(tree.join("big"), vec![b'x'; 3 << 20]).unwrap();
        symlink("etc/hello", tree.join("link")).unwrap();
        let fixture = Self { dir };
        succeeds(&["archive", &fixture.path("tree"), "-o", &fixture.path("a.clip")]);
        fixture
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The archive with one byte of its data flipped.
    fn corrupt(&self) -> String {
        let mut bytes = fs::read(self.path("a.clip")).unwrap();
        let at = bytes.windows(1 << 20).position(|w| w.iter().all(|b| *b == b'x')).unwrap() + 1000;
        bytes[at] ^= 1;
        fs::write(self.path("bad.clip"), bytes).unwrap();
        self.path("bad.clip")
    }
}

#[test]
fn help_is_grouped_and_has_examples_and_exit_codes() {
    let help = succeeds(&["--help"]);
    for word in
        ["Make and store archives:", "Run the CSI driver:", "Examples:", "Exit codes:", "  3    data is corrupt"]
    {
        assert!(help.contains(word), "{word:?} is not in {help}");
    }
    for name in SUBCOMMANDS {
        assert!(help.contains(&format!("\n  {name:<12} ")), "{name} is not in {help}");
        let own = succeeds(&[name, "--help"]);
        assert!(own.contains("Usage:"), "{own}");
    }
    assert!(succeeds(&["--version"]).starts_with("clip-csi 0."));
}

#[test]
fn wrong_usage_is_exit_code_2_and_names_what_is_wrong() {
    for (args, word) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["ls"], "<ARCHIVE>"),
        (&["index", "img", "-o", "x", "--platform", "linux"], "os/arch"),
        (&["index", "img", "-o", "x", "--span-kib", "1000"], "multiple of 64"),
        (&["ls", "--root", "somewhere", "a.clip"], "auto, bundle or archive"),
        (&["completions", "tcsh"], "bash"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(word), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn what_does_not_exist_is_exit_code_4() {
    let f = Fixture::new();
    fails(&["ls", "/no/such.clip"], 4, &["/no/such.clip"]);
    fails(&["cat", &f.path("a.clip"), "/etc/nothing"], 4, &["/etc/nothing", "no such file", "clip-csi ls"]);
    fails(&["archive", "./no-such-dir", "-o", &f.path("x.clip")], 4, &["./no-such-dir", "oci:DIR"]);
    fails(&["index", "oci:/no/such", "-o", &f.path("x.clip")], 4, &["oci:/no/such", "no such directory"]);
    fails(&["index", &format!("oci:{}", f.path("tree")), "-o", &f.path("x.clip")], 2, &["index.json"]);
    fails(&["archive", "oci-archive:/no/such.tar", "-o", &f.path("x.clip")], 4, &["/no/such.tar"]);
    assert!(!Path::new(&f.path("x.clip")).exists(), "a failed build leaves nothing");
}

#[test]
fn corrupt_data_is_exit_code_3_and_is_never_printed() {
    let f = Fixture::new();
    fs::write(f.path("garbage.clip"), vec![7; 4096]).unwrap();
    fails(&["inspect", &f.path("garbage.clip")], 3, &["garbage.clip", "not a CLIP archive"]);
    let bytes = fs::read(f.path("a.clip")).unwrap();
    fs::write(f.path("short.clip"), &bytes[..bytes.len() / 2]).unwrap();
    fails(&["ls", &f.path("short.clip")], 3, &["short.clip"]);

    let bad = f.corrupt();
    succeeds(&["ls", &bad, "/"]);
    let output = run(&["cat", &bad, "/big"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(output.stdout.iter().all(|b| *b == b'x'), "no byte that fails its digest is printed");
    succeeds(&["verify", &bad]);
    let output = run(&["verify", "--data", &bad]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("problem"), "{}", stderr(&output));
    assert_eq!(run(&["extract", &bad, &f.path("out")]).status.code(), Some(3));
}

#[test]
fn denied_access_is_exit_code_5() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            // A request's head fits into one read here; what is not read is not needed.
            let _ = stream.read(&mut [0; 4096]);
            let body = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
            let head = format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
    let url = format!("s3://bucket/key.clip?endpoint=http://127.0.0.1:{port}&region=us-east-1&path-style=true");
    let output = clip()
        .args(["inspect", &url])
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_ACCESS_KEY_ID", "id")
        .env("AWS_SECRET_ACCESS_KEY", "a-secret-value")
        .output()
        .unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(text.contains("bucket/key.clip") && text.trim_end().lines().count() == 1, "{text}");
    assert!(!text.contains("a-secret-value"));
}

#[test]
fn configuration_errors_name_file_key_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let path = file.to_str().unwrap();
    fs::write(&file, "cache:\n  maxBites: 1\n").unwrap();
    fails(&["node", "--config", path], 2, &[path, "cache.maxBites", "line 2"]);
    fs::write(&file, "cache:\n  lowWatermark: 95\n").unwrap();
    fails(&["node", "--config", path], 2, &["cache.lowWatermark is 95", "90"]);
    fails(&["controller", "--config", "/no/such.yaml"], 2, &["/no/such.yaml", "--config"]);
    fails(&["node", "--http-listen", "9810"], 2, &["telemetry.httpListen", "9810", "0.0.0.0:9810"]);
    let output = clip().arg("node").env("B9_CLIP_VERSION", "7").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("imageService.clipVersion is 7"), "{}", stderr(&output));
}

#[test]
fn an_archive_is_listed_printed_unpacked_and_verified() {
    let f = Fixture::new();
    let archive = f.path("a.clip");
    let listing = succeeds(&["ls", &archive]);
    let lines: Vec<&str> = listing.lines().collect();
    assert_eq!(lines.len(), 3, "{listing}");
    assert!(lines[0].starts_with("-rw-") && lines[0].ends_with(" big") && lines[0].contains(" 3145728 "), "{listing}");
    assert!(lines[1].starts_with("drwx") && lines[1].ends_with(" etc"), "{listing}");
    assert!(lines[2].starts_with("lrwx") && lines[2].ends_with(" link -> etc/hello"), "{listing}");
    let deep = succeeds(&["ls", "-R", &archive]);
    assert!(deep.contains("\n/etc:\n") && deep.contains(" hello\n"), "{deep}");
    assert_eq!(succeeds(&["cat", &archive, "/etc/hello", "/link"]), "hello, reader\n".repeat(2));
    assert!(succeeds(&["verify", "--data", &archive]).contains(": good; "));

    succeeds(&["extract", &archive, &f.path("out")]);
    assert_eq!(fs::read(f.path("out/big")).unwrap(), fs::read(f.path("tree/big")).unwrap());
    assert_eq!(fs::read_link(f.path("out/link")).unwrap(), Path::new("etc/hello"));
    let times = |name: &str| fs::metadata(f.path(name)).map(|m| (m.mtime(), m.mode())).unwrap();
    assert_eq!(times("out/etc/hello"), times("tree/etc/hello"));
    fails(&["extract", &archive, &f.path("out")], 1, &["not empty"]);
}

/// As in a rootless container: root, who may neither make devices nor give files to ids that do not exist there.
#[test]
fn extract_as_root_of_a_user_namespace_leaves_out_devices_and_owners_and_says_so() {
    let root = ["unshare", "--user", "--map-root-user"];
    let can = |args: &[&str]| Command::new(args[0]).args(&args[1..]).output().is_ok_and(|out| out.status.success());
    let f = Fixture::new();
    let (device, file) = (f.path("tree/null"), f.path("tree/etc/hello"));
    if !can(&["mknod", &device, "c", "1", "3"])
        || !can(&["chown", "1234:1234", &file])
        || !can(&[&root[..], &["true"]].concat())
    {
        return skip::skipped_here("needs root, mknod and user namespaces");
    }
    fs::hard_link(&device, f.path("tree/other-name")).unwrap();
    let archive = f.path("devices.clip");
    succeeds(&["archive", &f.path("tree"), "-o", &archive]);
    let mut command = Command::new(root[0]);
    command.args(&root[1..]).arg(env!("CARGO_BIN_EXE_clip-csi")).args(["extract", &archive, &f.path("out")]);
    let output = command.env("HOME", "/nonexistent").output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("2 device nodes were left out") && text.contains("1 names belong to you"), "{text}");
    assert_eq!(fs::read(f.path("out/etc/hello")).unwrap(), fs::read(&file).unwrap());
    assert!(fs::symlink_metadata(f.path("out/null")).is_err());
}

#[test]
fn the_json_of_inspect_is_stable() {
    let f = Fixture::new();
    let json: serde_json::Value = serde_json::from_str(&succeeds(&["inspect", "--json", &f.path("a.clip")])).unwrap();
    let mut keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "archive",
            "archiveBytes",
            "bundle",
            "detectedFrom",
            "digest",
            "extension",
            "image",
            "integrity",
            "layers",
            "schema",
            "storage",
            "tree",
            "version"
        ]
    );
    assert_eq!(json["schema"], 1);
    assert_eq!(json["version"], "v1");
    assert_eq!(json["storage"]["type"], "local");
    assert_eq!(json["tree"]["files"], 2);
    assert_eq!(json["tree"]["contentBytes"], (3 << 20) + 14);
    assert_eq!(json["integrity"]["covered"], "spans");
    assert_eq!(json["archiveBytes"], fs::metadata(f.path("a.clip")).unwrap().len());
    let text = succeeds(&["inspect", &f.path("a.clip")]);
    assert!(text.contains("version    v1 (") && text.contains("integrity  every byte is verified"), "{text}");
}

#[test]
fn push_writes_the_archive_and_create_only_does_not_overwrite() {
    let f = Fixture::new();
    fs::create_dir(f.path("store")).unwrap();
    let dest = format!("file://{}/", f.path("store"));
    succeeds(&["push", &f.path("a.clip"), &dest]);
    assert_eq!(fs::read(f.path("store/a.clip")).unwrap(), fs::read(f.path("a.clip")).unwrap());
    fails(&["push", "--create-only", &f.path("a.clip"), &dest], 1, &["store/a.clip", "exists already"]);
    fails(&["push", &f.path("tree/big"), &dest], 3, &["big", "not a CLIP archive"]);
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = succeeds(&["completions", shell]);
        assert!(SUBCOMMANDS.iter().all(|name| script.contains(name)), "{shell}");
    }
    let page = succeeds(&["man"]);
    assert!(page.contains(".TH clip-csi 1") && page.contains("Exit codes"), "{page}");
    let dir = tempfile::tempdir().unwrap();
    succeeds(&["man", "--dir", dir.path().to_str().unwrap()]);
    for name in SUBCOMMANDS {
        assert!(dir.path().join(format!("clip-csi-{name}.1")).is_file(), "{name}");
    }
}

#[test]
fn a_closed_pipe_is_no_error_to_tell() {
    let f = Fixture::new();
    let mut child =
        clip().args(["cat", &f.path("a.clip"), "/big"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(stderr(&output), "");
}

/// A running command that is killed if the test ends before it does.
struct Running(Child);

impl Running {
    /// Waits for a line of its stdout that holds `word`.
    fn wait_for(&mut self, word: &str) -> String {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let line = lines.by_ref().map_while(Result::ok).find(|line| line.contains(word));
        // The rest is read so that the command never blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        line.unwrap_or_else(|| panic!("it ended without saying {word:?}"))
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.0.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_raw(self.0.id().try_into().unwrap()).unwrap();
        let (say, ended) = std::sync::mpsc::channel();
        // Waits without taking the status away from the handle.
        std::thread::spawn(move || {
            let end = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
            say.send(rustix::process::waitid(rustix::process::WaitId::Pid(pid), end).is_ok())
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(true), "it does not end");
        self.0.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = dir.canonicalize().unwrap();
    let points =
        table.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| Path::new(point).starts_with(&dir));
    points.map(str::to_owned).collect()
}

/// Command lines of processes that name a path below `dir`.
fn processes_of(dir: &Path) -> Vec<String> {
    let needle = dir.to_str().unwrap();
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(needle)).collect()
}

#[track_caller]
fn nothing_is_left(dir: &Path) {
    assert_eq!(mounts_below(dir), Vec::<String>::new(), "mounts");
    assert_eq!(processes_of(dir), Vec::<String>::new(), "processes");
    let left: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, Vec::<PathBuf>::new(), "files");
}

#[test]
fn mount_serves_until_a_signal_and_unmounts() {
    skip::needs!(fuse);
    let f = Fixture::new();
    let at = f.dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let args = ["mount", &f.path("a.clip"), at.to_str().unwrap()];
    let mut mount = Running(clip().args(args).stdout(Stdio::piped()).spawn().unwrap());
    assert!(mount.wait_for("is mounted at").contains("Ctrl-C"));
    assert_eq!(fs::read_to_string(at.join("link")).unwrap(), "hello, reader\n");
    mount.signal(rustix::process::Signal::TERM);
    assert_eq!(mount.code(), Some(0));
    assert_eq!(mounts_below(&at), Vec::<String>::new());
}

#[test]
fn the_demo_without_mounts_reads_through_the_library_and_says_so_first() {
    let tmp = tempfile::tempdir().unwrap();
    let output = clip().args(["demo", "--library", "--size-mib", "3"]).env("TMPDIR", tmp.path()).output().unwrap();
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.lines().next().unwrap().contains("without mounts"), "{text}");
    assert!(text.contains("skipped    node plugin") && text.matches("= the image's").count() == 2, "{text}");
    nothing_is_left(tmp.path());
}

#[test]
fn the_demo_publishes_compares_and_leaves_nothing() {
    skip::needs!(fuse);
    let tmp = tempfile::tempdir().unwrap();
    let output = clip().args(["demo", "--size-mib", "3"]).env("TMPDIR", tmp.path()).output().unwrap();
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.contains("plugin     clip.csi.beam.cloud") && text.matches("= the image's").count() == 2, "{text}");
    nothing_is_left(tmp.path());
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    skip::needs!(fuse);
    let tmp = tempfile::tempdir().unwrap();
    let mut command = clip();
    command.args(["demo", "--size-mib", "8"]).env("TMPDIR", tmp.path()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut demo = Running(command.spawn().unwrap());
    demo.wait_for("plugin     ");
    demo.signal(rustix::process::Signal::INT);
    assert_eq!(demo.code(), Some(130));
    nothing_is_left(tmp.path());
}

/// The children of a process.
fn children_of(pid: u32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok()).collect::<String>();
    lists.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn a_demo_that_fails_says_so_and_leaves_nothing() {
    skip::needs!(fuse);
    let tmp = tempfile::tempdir().unwrap();
    let mut command = clip();
    command.args(["demo", "--size-mib", "64"]).env("TMPDIR", tmp.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut demo = Running(command.spawn().unwrap());
    demo.wait_for("plugin     ");
    // Its node plugin dies under it, while it publishes.
    let plugin = children_of(demo.0.id());
    assert_eq!(plugin.len(), 1, "the node plugin is its only child");
    let pid = rustix::process::Pid::from_raw(plugin[0]).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut said = String::new();
    demo.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(demo.code(), Some(1), "{said}");
    assert!(said.contains("the node plugin ended by itself") && !said.contains("panicked"), "{said}");
    nothing_is_left(tmp.path());
}

#[test]
fn a_demo_of_a_user_without_rights_says_in_its_first_line_what_it_lacks() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    let tmp = tempfile::tempdir().unwrap();
    // Where nobody may read and run it.
    let program = tmp.path().join("clip-csi");
    fs::copy(env!("CARGO_BIN_EXE_clip-csi"), &program).unwrap();
    let work = tmp.path().join("work");
    fs::create_dir(&work).unwrap();
    for path in [tmp.path(), &program, &work] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let mut command = Command::new(&program);
    command.args(["demo", "--size-mib", "3"]).env("TMPDIR", &work).env("HOME", &work).current_dir("/");
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    let first = text.lines().next().unwrap();
    assert!(first.contains("without mounts") && first.contains("CAP_SYS_ADMIN"), "{first}");
    assert!(text.contains("skipped    node plugin") && text.matches("= the image's").count() == 2, "{text}");
    nothing_is_left(&work);
}
