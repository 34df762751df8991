//! Numbers as people read them.

use std::time::Duration;

use crate::archive::{Kind, Timestamp};

/// `17 B`, `4.2 KiB`, `128.4 MiB`.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be written as 1024.0 of its unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `12,345`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `85 µs`, `12.3 ms`, `1.24 s`, `3 min 5 s`.
pub(super) fn duration(d: Duration) -> String {
    let seconds = d.as_secs_f64();
    match seconds {
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.2} s"),
        s => format!("{} min {} s", s as u64 / 60, s as u64 % 60),
    }
}

/// `n` as a share of `of`: `0.8 %`, `43 %`.
pub(super) fn percent(n: u64, of: u64) -> String {
    let share = 100.0 * n as f64 / of.max(1) as f64;
    if share < 10.0 { format!("{share:.1} %") } else { format!("{share:.0} %") }
}

/// A digest cut to what tells it from its neighbours: `sha256:0123456789ab…`.
pub(super) fn short_digest(digest: &str) -> String {
    match digest.char_indices().nth(19) {
        Some((cut, _)) => format!("{}…", &digest[..cut]),
        None => digest.to_owned(),
    }
}

/// `-rwsr-xr-x`, as `ls -l` writes it.
pub(super) fn mode(kind: Kind, mode: u16) -> String {
    let mut out = String::with_capacity(10);
    out.push(match kind {
        Kind::File => '-',
        Kind::Dir => 'd',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharDevice => 'c',
        Kind::BlockDevice => 'b',
    });
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')] {
        let bits = mode >> shift;
        out.push(if bits & 4 != 0 { 'r' } else { '-' });
        out.push(if bits & 2 != 0 { 'w' } else { '-' });
        out.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => set,
            (true, false) => unset,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    out
}

/// `2026-11-22 14:05`, in UTC.
pub(super) fn time(at: Timestamp) -> String {
    match time::OffsetDateTime::from_unix_timestamp(at.sec) {
        Ok(t) => format!("{:04}-{:02}-{:02} {:02}:{:02}", t.year(), t.month() as u8, t.day(), t.hour(), t.minute()),
        Err(_) => format!("@{}", at.sec),
    }
}

/// A name for a terminal: control characters and bytes that are no UTF-8 are escaped, so that an archive can't
/// command the terminal.
pub(super) fn escaped(name: &[u8]) -> String {
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
        }
        for byte in chunk.invalid() {
            out += &format!("\\x{byte:02x}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_counts_and_durations_read_well() {
        for (n, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_048_570, "1.0 MiB"), (134_637_159, "128.4 MiB")]
        {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!([count(0), count(999), count(1000), count(1234567)], ["0", "999", "1,000", "1,234,567"]);
        let ms = |n| duration(Duration::from_micros(n));
        assert_eq!(
            [ms(85), ms(12_340), ms(250_000), ms(1_240_000), ms(185_000_000)],
            ["85 µs", "12.3 ms", "250 ms", "1.24 s", "3 min 5 s"]
        );
        assert_eq!(percent(8, 1000), "0.8 %");
        assert_eq!(percent(43, 100), "43 %");
        assert_eq!(percent(1, 0), "100 %");
    }

    #[test]
    fn modes_are_written_as_ls_writes_them() {
        assert_eq!(mode(Kind::File, 0o4755), "-rwsr-xr-x");
        assert_eq!(mode(Kind::Dir, 0o1777), "drwxrwxrwt");
        assert_eq!(mode(Kind::File, 0o2644), "-rw-r-Sr--");
        assert_eq!(mode(Kind::Symlink, 0o777), "lrwxrwxrwx");
    }

    #[test]
    fn a_name_can_not_command_the_terminal() {
        assert_eq!(escaped("é\u{1b}[2J\n".as_bytes()), "é\\u{1b}[2J\\n");
        assert_eq!(escaped(b"a\xffb"), "a\\xffb");
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(Timestamp { sec: 0, nsec: 0 }), "1970-01-01 00:00");
        assert_eq!(time(Timestamp { sec: i64::MAX, nsec: 0 }), format!("@{}", i64::MAX));
    }
}
