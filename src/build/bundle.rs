//! `/config.json` of an OCI bundle: what a runtime needs to start the image as it was meant.

use serde_json::{Value, json};

use super::image_config::ImageConfig;

/// Users and groups that a runtime spec names by number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct User {
    uid: u32,
    gid: u32,
}

/// `nobody`, for users that can't be resolved: less than the image wants, never more.
pub(super) const NOBODY: User = User { uid: 65534, gid: 65534 };

/// Resolves an image's `User` (`name`, `uid`, `name:group`, `uid:gid`, any mix) in the image's own passwd and group files, as
/// container engines do: a bare uid takes its group from passwd, else 0. `None`: a name that the files don't know.
pub(super) fn user(text: &str, passwd: &[u8], group: &[u8]) -> Option<User> {
    let (user, group_name) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let fields = |line: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(line).trim_end_matches('\r').split(':').map(str::to_owned).collect()
    };
    let number = |text: Option<&String>| text.and_then(|t| t.parse::<u32>().ok());
    let wanted = if user.is_empty() { "0" } else { user };
    let by_number = wanted.parse::<u32>().ok();
    let found = passwd.split(|b| *b == b'\n').map(fields).find_map(|line| {
        let uid = number(line.get(2))?;
        let same = line.first().is_some_and(|name| name == wanted) || by_number == Some(uid);
        same.then(|| (uid, number(line.get(3)).unwrap_or(0)))
    });
    let (uid, own_gid) = found.or(by_number.map(|uid| (uid, 0)))?;
    let gid = match group_name {
        None | Some("") => own_gid,
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => group
                .split(|b| *b == b'\n')
                .map(fields)
                .find_map(|line| (line.first().is_some_and(|n| n == name)).then(|| number(line.get(2))).flatten())?,
        },
    };
    Some(User { uid, gid })
}

/// A runtime spec: root path `rootfs`, read-only; the usual mounts; fresh namespaces; the image's command, environment, labels.
pub(super) fn runtime_spec(config: &ImageConfig, user: User) -> Vec<u8> {
    let run = config.config.clone().unwrap_or_default();
    let mut args = run.entrypoint.unwrap_or_default();
    args.extend(run.cmd.unwrap_or_default());
    if args.is_empty() {
        args.push("/bin/sh".into());
    }
    let mut env = run.env.unwrap_or_default();
    if !env.iter().any(|var| var.starts_with("PATH=")) {
        env.insert(0, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    }
    let cwd = run.working_dir.filter(|dir| dir.starts_with('/')).unwrap_or("/".into());
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| -> Value {
        json!({ "destination": destination, "type": kind, "source": source, "options": options })
    };
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": user.uid, "gid": user.gid },
            "args": args,
            "env": env,
            "cwd": cwd,
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            ],
        },
        "annotations": run.labels.unwrap_or_default(),
    });
    let mut bytes = format!("{spec:#}").into_bytes();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:44::/:/bin/false\nbroken\n";
    const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:web\n";

    #[test]
    fn users_are_resolved_as_container_engines_do() {
        let ids = |text| user(text, PASSWD, GROUP).map(|u| (u.uid, u.gid));
        assert_eq!(ids(""), Some((0, 0)));
        assert_eq!(ids("web"), Some((33, 44)));
        assert_eq!(ids("33"), Some((33, 44)));
        assert_eq!(ids("1000"), Some((1000, 0)));
        assert_eq!(ids("web:staff"), Some((33, 50)));
        assert_eq!(ids("1000:7"), Some((1000, 7)));
        assert_eq!(ids("nobody"), None);
        assert_eq!(ids("web:nogroup"), None);
    }
}
