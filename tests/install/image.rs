//! The container image that `make image` writes.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use crate::root;
use crate::skip::{needs, skipped};

const LIMIT: Duration = Duration::from_secs(60);

/// Header of an ELF file for x86-64 without program headers: nothing needs a loader.
fn static_elf() -> Vec<u8> {
    let mut out = vec![0u8; 64];
    out[..6].copy_from_slice(b"\x7fELF\x02\x01");
    out[18] = 62;
    out[54] = 56;
    out
}

fn write_image(binary: &Path, out: &Path) -> (bool, String) {
    let mut script = Command::new(root().join(".ci/image.py"));
    let output = script.arg(binary).arg(out).args(["example.com/clip-csi:1", "1.2.3", "abc"]).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn clip(args: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The image's files, by our own reader of images.
fn unpack(archive: &Path, dir: &Path) -> PathBuf {
    let (index, rootfs) = (dir.join("image.clip"), dir.join("rootfs"));
    // A v1 archive of an image is a bundle: its files lie below /rootfs.
    let from = format!("oci-archive:{}", archive.display());
    clip(&["archive", &from, "-o", index.to_str().unwrap()]);
    clip(&["extract", index.to_str().unwrap(), rootfs.to_str().unwrap()]);
    if rootfs.join("rootfs").is_dir() { rootfs.join("rootfs") } else { rootfs }
}

#[test]
fn the_same_binary_gives_the_same_bytes_and_the_image_holds_what_it_should() {
    needs!("python3");
    let dir = tempfile::tempdir().unwrap();
    let (binary, a, b) = (dir.path().join("clip-csi"), dir.path().join("a.tar"), dir.path().join("b.tar"));
    fs::write(&binary, static_elf()).unwrap();
    for out in [&a, &b] {
        let (good, said) = write_image(&binary, out);
        assert!(good, "{said}");
    }
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "not deterministic");
    let rootfs = unpack(&a, dir.path());
    assert_eq!(fs::read(rootfs.join("usr/bin/clip-csi")).unwrap(), static_elf());
    assert!(
        fs::read_to_string(rootfs.join("etc/ssl/certs/ca-certificates.crt")).unwrap().contains("BEGIN CERTIFICATE")
    );
    assert!(fs::read_to_string(rootfs.join("etc/nsswitch.conf")).unwrap().contains("hosts: files dns"));
    assert!(rootfs.join("tmp").is_dir() && rootfs.join("var/lib/clip-csi").is_dir());
    let dockerfile = crate::read("Dockerfile");
    for name in ["passwd", "group", "nsswitch.conf"] {
        let text = fs::read_to_string(rootfs.join("etc").join(name)).unwrap().replace('\n', "\\n");
        let line = format!("printf '{text}' > $root/etc/{name}");
        assert!(dockerfile.contains(&line), "the Dockerfile makes another image: no {line}");
    }
}

#[test]
fn a_dynamic_binary_is_refused_since_it_could_not_start() {
    needs!("python3");
    let dir = tempfile::tempdir().unwrap();
    let (good, said) = write_image(Path::new("/bin/sh"), &dir.path().join("a.tar"));
    assert!(!good && said.contains("dynamic"), "{said}");
}

/// An A record for whatever is asked: 127.0.0.1; no other records.
fn name_server(socket: UdpSocket) {
    let mut buffer = [0u8; 512];
    while let Ok((len, from)) = socket.recv_from(&mut buffer) {
        let query = &buffer[..len];
        // The name ends with a zero byte; type and class follow.
        let Some(end) = query.get(12..).and_then(|q| q.iter().position(|b| *b == 0)).map(|at| 12 + at + 5) else {
            continue;
        };
        let Some(question) = query.get(12..end) else { continue };
        let is_a = question[question.len() - 4..] == [0, 1, 0, 1];
        let mut answer = [&query[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0], question].concat();
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = socket.send_to(&answer, from);
    }
}

/// Answers 404 to everything, tells the Host of each request.
fn registry(listener: TcpListener, hosts: mpsc::Sender<String>) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        let mut request = Vec::new();
        let mut buffer = [0u8; 1024];
        while !request.windows(4).any(|w| w == b"\r\n\r\n") {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(n) => request.extend(&buffer[..n]),
            }
        }
        let text = String::from_utf8_lossy(&request).to_lowercase();
        if let Some(host) = text.lines().find_map(|line| line.strip_prefix("host: ").map(str::to_owned)) {
            let _ = hosts.send(host);
        }
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
}

/// The static binary in its empty root: names come from /etc/hosts and from a name server, by glibc's own resolver.
#[test]
fn names_resolve_in_the_image_by_its_hosts_file_and_by_dns() {
    let Some(archive) = std::env::var_os("CLIP_CSI_IMAGE") else {
        return skipped(
            "names_resolve_in_the_image_by_its_hosts_file_and_by_dns",
            "CLIP_CSI_IMAGE names no image (`make image`)",
        );
    };
    let port_53 = UdpSocket::bind("127.0.0.153:53");
    let (true, Ok(server)) = (rustix::process::geteuid().is_root(), port_53) else {
        return skipped("names_resolve_in_the_image_by_its_hosts_file_and_by_dns", "it takes root: chroot and port 53");
    };
    std::thread::spawn(move || name_server(server));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, hosts) = mpsc::channel();
    std::thread::spawn(move || registry(listener, sender));
    let dir = tempfile::tempdir().unwrap();
    let rootfs = unpack(Path::new(&archive), dir.path());
    fs::write(rootfs.join("etc/hosts"), "127.0.0.1 by-hosts-file.example\n").unwrap();
    fs::write(rootfs.join("etc/resolv.conf"), "nameserver 127.0.0.153\n").unwrap();
    for name in ["by-hosts-file.example", "by-name-server.example"] {
        let host = format!("{name}:{port}");
        let mut command = Command::new("chroot");
        command.arg(&rootfs).args(["/usr/bin/clip-csi", "index", "--plain-http", &host]);
        let output = command.arg(format!("{host}/team/app:1")).args(["-o", "/tmp/app.clip"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let asked = hosts.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{name} was not resolved: {said}"));
        assert_eq!(asked, host);
        assert_eq!(output.status.code(), Some(4), "an image that is not there: {said}");
        while hosts.try_recv().is_ok() {}
    }
}
