//! A safe face for zlib's inflate: with [`super::twin`], all of this module's `unsafe`.

use std::ffi::CStr;

use libz_rs_sys as z;

use super::window::WINDOW;

/// What surrounds the deflate data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrap {
    /// A gzip member: header and trailer are parsed and checked.
    Gzip,
    /// Nothing: deflate data from some block on.
    Raw,
}

impl Wrap {
    /// zlib's `windowBits`: always the full 32 KiB, plus 16 for gzip, negative for raw.
    const fn window_bits(self) -> i32 {
        match self {
            Self::Gzip => 15 + 16,
            Self::Raw => -15,
        }
    }
}

/// Where a step stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Input or output is used up.
    More,
    /// Between two blocks of one stream; `bits` of the last byte taken belong to the next block.
    Block {
        /// 0..=7.
        bits: u8,
    },
    /// The stream is over, its trailer (gzip) taken and right.
    End,
}

/// What one step did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Input bytes taken.
    pub(super) consumed: usize,
    /// Output bytes written.
    pub(super) produced: usize,
    /// Why it stopped.
    pub(super) stop: Stop,
}

/// One inflate state, about 40 KiB; [`ZStream::reset`] makes it as new.
pub(super) struct ZStream {
    // Boxed because the library may remember where the struct lies.
    raw: Box<z::z_stream>,
}

// SAFETY: the state behind the raw pointers is owned by this value alone (allocated by inflateInit2_, freed in drop)
// and zlib-rs keeps nothing per thread.
unsafe impl Send for ZStream {}

impl ZStream {
    /// A new state; `None` without memory for it.
    pub(super) fn new(wrap: Wrap) -> Option<Self> {
        let mut raw = Box::<z::z_stream>::default();
        // SAFETY: `raw` is a valid z_stream with its default allocator; version and size are those of the linked
        // library.
        let code = unsafe {
            z::inflateInit2_(&mut *raw, wrap.window_bits(), z::zlibVersion(), size_of::<z::z_stream>() as i32)
        };
        (code == z::Z_OK).then_some(Self { raw })
    }

    /// Forgets everything and expects `wrap` next.
    pub(super) fn reset(&mut self, wrap: Wrap) {
        // SAFETY: `raw` was initialised in `new`.
        let code = unsafe { z::inflateReset2(&mut *self.raw, wrap.window_bits()) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// Puts the high `bits` (0..=7) bits of `byte` before the input. Only right after a reset to [`Wrap::Raw`].
    pub(super) fn prime(&mut self, bits: u8, byte: u8) {
        let bits = bits.min(7);
        if bits > 0 {
            // SAFETY: `raw` was initialised in `new`; the function bounds the bit count itself.
            let code = unsafe { z::inflatePrime(&mut *self.raw, i32::from(bits), i32::from(byte >> (8 - bits))) };
            debug_assert_eq!(code, z::Z_OK);
        }
    }

    /// Sets what comes before the input. Only right after a reset to [`Wrap::Raw`].
    pub(super) fn set_window(&mut self, window: &[u8]) {
        let window = &window[window.len().saturating_sub(WINDOW)..];
        // SAFETY: pointer and length are those of a live slice of at most 32 KiB, which is copied.
        let code = unsafe { z::inflateSetDictionary(&mut *self.raw, window.as_ptr(), window.len() as u32) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// The last bytes written, 32 KiB or as many as this stream has.
    pub(super) fn window(&self) -> Vec<u8> {
        let mut out = vec![0; WINDOW];
        let mut len = 0;
        // SAFETY: the library writes at most 32 KiB, the length of `out`, and the length to `len`.
        let code = unsafe { z::inflateGetDictionary(&*self.raw, out.as_mut_ptr(), &mut len) };
        out.truncate(if code == z::Z_OK { len as usize } else { 0 });
        out
    }

    /// Inflates until input or output is used up, the stream ends, or (`stop_at_block`) a block does.
    pub(super) fn inflate(&mut self, input: &[u8], output: &mut [u8], stop_at_block: bool) -> Result<Step, String> {
        let (give, room) = (input.len().min(u32::MAX as usize), output.len().min(u32::MAX as usize));
        self.raw.next_in = input.as_ptr();
        self.raw.avail_in = give as u32;
        self.raw.next_out = output.as_mut_ptr();
        self.raw.avail_out = room as u32;
        // SAFETY: `raw` was initialised in `new`; next_in/avail_in and next_out/avail_out describe live slices, which
        // outlive the call and do not overlap (one is shared, one exclusive).
        let code = unsafe { z::inflate(&mut *self.raw, if stop_at_block { z::Z_BLOCK } else { z::Z_NO_FLUSH }) };
        let (consumed, produced) = (give - self.raw.avail_in as usize, room - self.raw.avail_out as usize);
        // No pointer into a slice stays behind.
        self.raw.next_in = std::ptr::null();
        self.raw.next_out = std::ptr::null_mut();
        (self.raw.avail_in, self.raw.avail_out) = (0, 0);
        // data_type: 128 = between two blocks, 64 = the last block has been read, low bits = unused bits.
        let (state, bits) = (self.raw.data_type, self.raw.data_type & 63);
        let stop = match code {
            z::Z_STREAM_END => Stop::End,
            z::Z_OK | z::Z_BUF_ERROR if state & (128 | 64) == 128 && bits < 8 => Stop::Block { bits: bits as u8 },
            z::Z_OK | z::Z_BUF_ERROR => Stop::More,
            z::Z_NEED_DICT => return Err("a preset dictionary is needed".into()),
            _ if self.raw.msg.is_null() => return Err(format!("zlib error {code}")),
            // SAFETY: a non-null msg points to a NUL-terminated string of static life inside the library.
            _ => return Err(unsafe { CStr::from_ptr(self.raw.msg) }.to_string_lossy().into_owned()),
        };
        Ok(Step { consumed, produced, stop })
    }
}

impl Drop for ZStream {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, ended nowhere else.
        unsafe { z::inflateEnd(&mut *self.raw) };
    }
}
