//! `/proc/self/mountinfo`: what is mounted where. Reading it asks no filesystem anything, so it can't hang on a dead mount.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Mount id, unique while it is mounted.
    pub id: u64,
    /// Id of the mount that this one lies on.
    pub parent: u64,
    /// `major:minor`. Two FUSE sessions never have the same one at the same time.
    pub device: String,
    /// The path inside its filesystem that is its root: `/`, or deeper for a bind mount.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Options of the mount (not of the filesystem), comma-separated.
    pub options: String,
    /// `ext4`, `fuse`, `fuse.clip`.
    pub fs_type: String,
    /// Device, or the name that the filesystem was given.
    pub source: OsString,
}

impl Mount {
    /// Is `option` set on the mount?
    pub(crate) fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|o| o == option)
    }
}

/// All mounts of this mount namespace that are visible from our root.
#[derive(Debug, Clone, Default)]
pub(crate) struct MountTable(Vec<Mount>);

impl MountTable {
    /// Reads the kernel's table. A few milliseconds at a thousand mounts.
    pub(crate) fn read() -> std::io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    /// Parses the table; a line that is not understood is left out.
    pub(crate) fn parse(text: &[u8]) -> Self {
        Self(text.split(|b| *b == b'\n').filter_map(parse_line).collect())
    }

    /// All mounts.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mount> {
        self.0.iter()
    }

    /// The mount that a path lookup of `path` ends in, if `path` is a mount point. Mounts stacked on one point are
    /// told apart by their parents: the order of the lines says nothing of that.
    pub(crate) fn top(&self, path: &Path) -> Option<&Mount> {
        let here = || self.0.iter().filter(|mount| mount.point == path);
        here().find(|mount| !here().any(|other| other.parent == mount.id && other.id != mount.id))
    }

    /// The mount that comes to light when `mount` is taken away: the one below it at the same point.
    pub(crate) fn below(&self, mount: &Mount) -> Option<&Mount> {
        self.0.iter().find(|other| other.id == mount.parent && other.point == mount.point && other.id != mount.id)
    }
}

/// `36 35 98:0 /root /point rw,noatime shared:1 - fuse.clip source rw,errors=continue`: proc_pid_mountinfo(5).
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ').filter(|field| !field.is_empty());
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = text(fields.next()?);
    let root = PathBuf::from(unescape(fields.next()?));
    let point = PathBuf::from(unescape(fields.next()?));
    let options = text(fields.next()?);
    // Any number of optional fields, ended by a hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = text(fields.next()?);
    // An empty source is written as nothing at all, and then the options of the filesystem follow.
    let source = match (fields.next(), fields.next()) {
        (Some(source), Some(_)) => unescape(source),
        _ => OsString::new(),
    };
    Some(Mount { id, parent, device, root, point, options, fs_type, source })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(unescape(field).as_bytes()).into_owned()
}

/// Undoes the kernel's escapes: a backslash and three octal digits stand for one byte (space, tab, newline, `\`, `#`).
fn unescape(field: &[u8]) -> OsString {
    if !field.contains(&b'\\') {
        return OsStr::from_bytes(field).to_owned();
    }
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let (byte, after) = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] => {
                ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), after)
            }
            _ => (*first, tail),
        };
        out.push(byte);
        rest = after;
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:50 / /var/lib/a\\040b\\134c\\011d\\012e ro,nosuid,nodev,relatime shared:7 master:2 - fuse.clip clip-csi:00112233:00112233445566778899aabbccddeeff ro,user_id=0
41 40 0:51 /usr/bin /var/lib/a\\040b\\134c\\011d\\012e ro - tmpfs tmpfs rw
garbage
42 22 0:52 / /none rw - tmpfs  rw
";

    #[test]
    fn octal_escapes_become_the_bytes_they_stand_for() {
        let table = MountTable::parse(TABLE);
        let point = Path::new("/var/lib/a b\\c\td\ne");
        assert_eq!(table.iter().filter(|m| m.point == point).count(), 2);
    }

    #[test]
    fn the_top_of_a_stack_is_found_in_any_order_of_lines() {
        let point = Path::new("/var/lib/a b\\c\td\ne");
        let table = MountTable::parse(TABLE);
        assert_eq!(table.top(point).unwrap().id, 41);
        assert_eq!(table.top(point).unwrap().root, Path::new("/usr/bin"));
        let reversed = MountTable(table.0.iter().rev().cloned().collect());
        assert_eq!(reversed.top(point).unwrap().id, 41);
        assert!(table.top(Path::new("/var/lib")).is_none());
        assert_eq!(table.below(table.top(point).unwrap()).unwrap().id, 40);
        assert!(table.below(table.iter().find(|m| m.id == 40).unwrap()).is_none());
    }

    #[test]
    fn options_are_whole_words_and_types_are_whole() {
        let table = MountTable::parse(TABLE);
        let mount = table.iter().find(|m| m.id == 40).unwrap();
        assert_eq!(mount.source, "clip-csi:00112233:00112233445566778899aabbccddeeff");
        assert!(mount.has_option("nosuid") && !mount.has_option("no") && mount.fs_type == "fuse.clip");
    }

    #[test]
    fn lines_that_are_not_understood_are_left_out() {
        let table = MountTable::parse(TABLE);
        assert_eq!(table.iter().count(), 4);
        assert_eq!(table.iter().find(|m| m.id == 42).unwrap().source, "");
        assert_eq!(MountTable::parse(b"").iter().count(), 0);
        assert_eq!(MountTable::parse(b"1 2\n1 2 3 4 5 6\n\\\n").iter().count(), 0);
    }

    #[test]
    fn escapes_that_are_none_stay_as_they_are() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"a\\999"), "a\\999");
        assert_eq!(unescape(b"\\"), "\\");
        assert_eq!(unescape(b"\\134040"), "\\040");
    }

    #[test]
    fn the_kernels_own_table_has_a_root() {
        assert!(MountTable::read().unwrap().top(Path::new("/")).is_some());
    }
}
