#![no_main]

use cnnrs::image::Format;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| -> libfuzzer_sys::Corpus { cnnrs_fuzz::decode_one(bytes, Format::Bmp) });
