#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| clip_csi_fuzz::targets::tocs::run(input));
