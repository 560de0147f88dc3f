//! Every input the fuzzers started from or stumbled over: an image or an error, never a panic, never much memory.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use cnnrs::error::Error;
use cnnrs::image::{Image, Limits, ReadOptions, Truncated, decode_with};

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a tally.
struct Tally;

// SAFETY: hands everything through to the system's allocator.
unsafe impl GlobalAlloc for Tally {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(used, Relaxed);
        // SAFETY: as our caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as our caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static TALLY: Tally = Tally;

#[test]
fn no_input_of_the_fuzzers_panics_or_takes_much_memory() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    // As in the fuzz targets: a bitmap of a million pixels is 4 MiB, and a decoder may hold a few of these.
    let limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };
    let mut tried = 0;
    for folder in fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.file_name().unwrap().to_string_lossy().starts_with("decode_") {
            continue;
        }
        for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let bytes = fs::read(&file).unwrap();
            for truncated in [Truncated::Error, Truncated::Accept] {
                let options = ReadOptions { limits, exif: true, truncated, ..ReadOptions::default() };
                PEAK.store(USED.load(Relaxed), Relaxed);
                let before = USED.load(Relaxed);
                let mut image = Image::default();
                let outcome = decode_with(&bytes, &options, &mut image);
                assert!(!matches!(outcome, Err(Error::Panic(_))), "{}: {outcome:?}", file.display());
                let taken = PEAK.load(Relaxed) - before;
                assert!(taken < 64 << 20, "{}: {taken} bytes", file.display());
                tried += 1;
            }
        }
    }
    assert!(tried > 100, "only {tried} inputs in {}", corpus.display());
}
