//! As `inflate`, for zstd: frames of any level and form, skippable ones between them, or bytes themselves.

use std::io::Write as _;

use ::zstd::stream::Encoder;
use arbitrary::{Result, Unstructured};

use super::inflate::{Setting, check, damage, text};
use crate::units::Compression;

/// RFC 8878, 3.1.2: the first of 16 magic numbers of skippable frames.
const SKIPPABLE: u32 = 0x184D_2A50;

pub fn run(input: &[u8]) {
    let _ = try_run(&mut Unstructured::new(input));
}

fn try_run(u: &mut Unstructured<'_>) -> Result<()> {
    let how: u8 = u.arbitrary()?;
    let setting = Setting::pick(u)?;
    match how % 8 {
        0 | 1 => check(Compression::Zstd, u.bytes(u.len())?, &setting),
        more => {
            let mut blob = frames(u)?;
            if more == 2 {
                damage(&mut blob, u)?;
            }
            check(Compression::Zstd, &blob, &setting);
        }
    }
    Ok(())
}

fn frames(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for _ in 0..u.int_in_range(1..=4)? {
        if u.ratio(1, 4)? {
            let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
            out.extend_from_slice(&(SKIPPABLE + u.int_in_range(0..=15)?).to_le_bytes());
            out.extend_from_slice(&(len as u32).to_le_bytes());
            out.extend_from_slice(u.bytes(len)?);
            continue;
        }
        let mut encoder = Encoder::new(out, u.int_in_range(-5..=5)?).expect("memory");
        encoder.include_checksum(u.arbitrary()?).expect("a flag");
        encoder.window_log(u.int_in_range(10..=17)?).expect("a window");
        let text = text(u)?;
        if u.arbitrary()? {
            encoder.set_pledged_src_size(Some(text.len() as u64)).expect("a size");
        }
        let flush = u.choose_index(text.len() + 1)?;
        encoder.write_all(&text[..flush]).expect("memory");
        if u.arbitrary()? {
            encoder.flush().expect("memory");
        }
        encoder.write_all(&text[flush..]).expect("memory");
        out = encoder.finish().expect("memory");
    }
    Ok(out)
}
