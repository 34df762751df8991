//! Memory that a build leaves behind.

/// Gives what finished builds have freed back to the kernel. glibc keeps it in the arena of each thread that took part (64 MiB
/// and more after a few images), for a next build that may never come; a node has better uses for it. Takes milliseconds.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, not a pointer, and locks each arena while it looks at it.
    unsafe {
        libc::malloc_trim(0);
    }
}
