//! zstd's streaming decoder, with the limits that we set it.

use zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

/// Largest window: 128 MiB, what the zstd command accepts unasked. Layers of `--ultra -22` need it.
const WINDOW_LOG_MAX: u32 = 27;

/// A decoder; `None` without memory for it.
pub(super) fn decoder() -> Option<DCtx<'static>> {
    let mut decoder = DCtx::try_create()?;
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).ok()?;
    Some(decoder)
}

/// What one step did.
pub(super) struct Step {
    pub(super) consumed: usize,
    pub(super) produced: usize,
    /// The frame (data or skippable) is over, its checksum, if any, right.
    pub(super) ended: bool,
}

/// Decodes until input or output is used up or the frame ends. The next step after an end starts the next frame.
pub(super) fn step(decoder: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<Step, String> {
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(output);
    match decoder.decompress_stream(&mut to, &mut from) {
        Ok(hint) => Ok(Step { consumed: from.pos(), produced: to.pos(), ended: hint == 0 }),
        Err(code) if zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge) => {
            Err("a frame needs a window of more than 128 MiB; compress the layer again without --long above 27".into())
        }
        Err(code) => Err(zstd_safe::get_error_name(code).to_lowercase()),
    }
}
