//! What a program took.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Of one process.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    pub wall: Duration,
    /// User and system time.
    pub cpu: Duration,
    /// Peak of its resident memory.
    pub peak_bytes: u64,
}

/// Runs a program to its end, which must be a good one; gives its standard output too.
// `wait4` does what clippy looks for.
#[allow(clippy::zombie_processes)]
pub fn measured(command: &mut Command) -> (Usage, String) {
    let since = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it can be started");
    // Not `ru_maxrss`: that begins with the memory of who started it.
    let status = format!("/proc/{}/status", child.id());
    let peak = std::thread::spawn(move || {
        let mut peak = 0;
        // A zombie has no such line. What grows in the last milliseconds is missed.
        while let Some(now) = high_water(&status) {
            peak = now;
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let mut output = String::new();
    child.stdout.take().expect("it is piped").read_to_string(&mut output).expect("its output is text");
    let pid = libc::pid_t::try_from(child.id()).expect("a process number");
    // SAFETY: all zeros are a valid value of this plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let mut status = 0;
    // SAFETY: both pointers are to live variables of the right types. The child is ours, and `child.wait` is never called, so nobody else
    // reaps it.
    let reaped = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    assert_eq!(reaped, pid, "wait4: {}", std::io::Error::last_os_error());
    assert_eq!(status, 0, "{command:?}: {output}");
    let time = |t: libc::timeval| Duration::from_micros(t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64);
    let usage = Usage {
        wall: since.elapsed(),
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak_bytes: peak.join().expect("it only reads") * 1024,
    };
    (usage, output)
}

/// Peak of the resident memory of a running process in kB, from its `/proc/…/status`.
fn high_water(status: &str) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}
