#![no_main]

use cnnrs::data::mnist::{Kind, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for kind in [Kind::Images, Kind::Labels] {
        if let Ok(idx) = parse(bytes, kind) {
            assert_eq!(idx.data.len(), idx.shape.iter().product::<usize>());
        }
    }
});
