//! Whether our entropy decoder may be used: one picture through it and through libjpeg's own, once per process.
//!
//! `build.rs` knows that structures lie where we think; this knows that libjpeg treats them as we think.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::image::Image;

/// Baseline 4:2:0, sides that are no multiple of an MCU's; more than eight restarts, stuffed bytes, codes of up to 16 bits,
/// runs of more than 15 zeros, blocks that are full.
pub const PICTURE: &[u8] = include_bytes!("probe.jpg");

/// What is known of our decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does as libjpeg's.
    Agrees,
    /// The picture came out differently.
    Differs,
    /// It was built without a look at libjpeg's headers.
    Unchecked,
}

type Decode = fn(&[u8]) -> Option<Image>;

pub struct Probe {
    own: Decode,
    libjpegs: Decode,
    // No lock: a forked child may be without the thread that holds it. Two threads may find out the same thing at once.
    known: AtomicU8,
}

const UNKNOWN: u8 = 0;
const AGREES: u8 = 1;
const DIFFERS: u8 = 2;

impl Probe {
    pub const fn new(own: Decode, libjpegs: Decode) -> Self {
        Self { own, libjpegs, known: AtomicU8::new(UNKNOWN) }
    }

    pub fn verdict(&self) -> Verdict {
        if !cfg!(cnnrs_libjpeg_layout) {
            return Verdict::Unchecked;
        }
        match self.known.load(Ordering::Relaxed) {
            AGREES => Verdict::Agrees,
            DIFFERS => Verdict::Differs,
            _ => self.find_out(),
        }
    }

    #[cold]
    fn find_out(&self) -> Verdict {
        let decoded = |decode: Decode| {
            let image = catch_unwind(AssertUnwindSafe(|| decode(PICTURE))).ok().flatten()?;
            Some((image.width, image.height, image.data))
        };
        let (own, libjpegs) = (decoded(self.own), decoded(self.libjpegs));
        if libjpegs.is_none() {
            // No memory for the moment, as a rule: the next picture asks again.
            return Verdict::Differs;
        }
        let agree = own == libjpegs;
        self.known.store(if agree { AGREES } else { DIFFERS }, Ordering::Relaxed);
        if agree { Verdict::Agrees } else { Verdict::Differs }
    }
}
