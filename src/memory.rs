//! What the process asks of its allocator, glibc's; nothing where it is another one.
//!
//! A plugin lives for months and its threads come and go with mounts and builds. Left to itself, glibc takes what was freed once
//! as the measure of what to keep: after the first mount has ended, the 16 MiB that each FUSE thread sets aside for requests are
//! no longer mapped untouched but cut from an arena and zeroed, so that every mount costs up to 64 MiB, and arenas keep them afterwards.

/// Longest allocation that an arena serves; a longer one is mapped, and unmapped when it is freed. Above the usual span (2,176 KiB),
/// whose buffers come and go with every cold read, and below FUSE's.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 8 << 20;

/// Free bytes at an arena's end that it keeps.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 4 << 20;

/// To be called once, when the process starts.
pub fn settle() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers. Either call stops the thresholds from moving by themselves.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Gives free pages back to the kernel that lie between others. Takes milliseconds, so for where much has been freed, as after a build.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, not a pointer, and locks each arena while it looks at it.
    unsafe {
        libc::malloc_trim(0);
    }
}
