//! From bits to the coefficients of one block.

use super::table::{END, LAST, LONG, LOOK, Table, WHOLE, WIDE, extend};

/// Where coefficient `k` of the zigzag belongs. Behind the last: unsound files, which are given up later.
#[rustfmt::skip]
const ZIGZAG: [u8; 128] = [
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
];

/// The same where rows are 32 coefficients long.
const LANES_ZIGZAG: [u8; 128] = {
    let mut places = ZIGZAG;
    let mut k = 0;
    while k < places.len() {
        places[k] = ZIGZAG[k] / 8 * 32 + ZIGZAG[k] % 8;
        k += 1;
    }
    places
};

/// Sixty-four coefficients: row by row, in rows of eight or, with `LANES`, of 32.
pub struct Block<const LANES: bool>(*mut i16);

impl<const LANES: bool> Block<LANES> {
    /// # Safety
    /// At `coefficients` there must be room for all rows as long as the block is there.
    #[inline(always)]
    pub unsafe fn at(coefficients: *mut i16) -> Self {
        Self(coefficients)
    }

    /// Sets coefficient `k` of the zigzag; behind the last: the last.
    #[inline(always)]
    pub fn put(&mut self, k: usize, value: i16) {
        let place = usize::from(if LANES { LANES_ZIGZAG[k & 127] } else { ZIGZAG[k & 127] });
        // SAFETY: a place in the last row at most, which `at` was promised.
        unsafe { *self.0.add(place) = value }
    }
}

#[derive(Clone, Copy, Default)]
pub struct Bits {
    /// The next bits, from the top.
    window: u64,
    pub count: u32,
    /// The next byte of `data`.
    pub at: usize,
}

impl Bits {
    /// At least 32 bits, enough for the longest code (16) and value (15).
    #[inline(always)]
    fn refill(&mut self, data: &[u8]) {
        if self.count < 32 {
            self.fill(data);
        }
    }

    /// 56 bits at least.
    #[inline(always)]
    fn fill(&mut self, data: &[u8]) {
        if let Some(&eight) = data.get(self.at..).and_then(<[u8]>::first_chunk::<8>) {
            self.window |= u64::from_be_bytes(eight) >> self.count;
            self.at += ((63 - self.count) / 8) as usize;
            self.count |= 56;
        } else {
            // Behind the end: what is left of the padding, then zeros.
            while self.count <= 56 {
                let byte = data.get(self.at).copied().unwrap_or(0);
                self.window |= u64::from(byte) << (56 - self.count);
                self.at += 1;
                self.count += 8;
            }
        }
    }

    #[inline(always)]
    fn skip(&mut self, count: u32) {
        self.window <<= count;
        self.count -= count;
    }

    #[inline(always)]
    fn number(&mut self, size: u32) -> i32 {
        let raw = self.window >> (64 - size);
        self.skip(size);
        extend(raw, size)
    }

    /// The first coefficient of a block: its difference from the one before.
    #[inline(always)]
    pub fn first(&mut self, data: &[u8], table: &Table) -> Option<i32> {
        self.fill(data);
        let e = table.look[(self.window >> (64 - LOOK)) as usize];
        if e & WHOLE != 0 {
            self.skip(e & 63);
            return Some((e as i32) >> 16);
        }
        let (size, length) = match e {
            0 => table.long(self.window).map(|(symbol, length)| (u32::from(symbol & 15), length))?,
            e => (e >> 12, e & 63),
        };
        self.skip(length);
        Some(if size == 0 { 0 } else { self.number(size) })
    }

    /// The others, and whether there are any.
    #[inline(always)]
    pub fn others<const LANES: bool>(&mut self, data: &[u8], table: &Table, block: &mut Block<LANES>) -> Option<bool> {
        others(self, data, table, block)
    }
}

/// The other 63 coefficients of a block.
#[inline(always)]
fn others<const LANES: bool>(bits: &mut Bits, data: &[u8], table: &Table, block: &mut Block<LANES>) -> Option<bool> {
    let mut k = 1;
    let Some(steps) = table.steps() else { return tail(bits, data, table, block, k) };
    while k < LAST {
        bits.fill(data);
        let mut step = 0;
        // As often as the bits last.
        for _ in 0..56 / WIDE {
            step = steps[(bits.window >> (64 - WIDE)) as usize];
            bits.skip(step as u32 & 63);
            // The second first: where it is a zero that falls behind the block, it meets the last coefficient.
            block.put(k + byte(step, 24), (step >> 48) as i16);
            block.put(k + byte(step, 16), (step >> 32) as i16);
            k += byte(step, 8);
            if k >= LAST {
                break;
            }
        }
        if k >= LONG {
            k -= LONG;
            bits.refill(data);
            let (run, size) = match byte(step, 24) as u32 {
                0 => {
                    let (symbol, length) = table.long(bits.window)?;
                    bits.skip(length);
                    (usize::from(symbol >> 4), u32::from(symbol & 15))
                }
                size => (byte(step, 16), size),
            };
            if size > 0 {
                block.put(k + run, bits.number(size) as i16);
            } else if run != 15 {
                return Some(k > 1);
            }
            k += run + 1;
        } else if k >= END {
            return Some(k > 1 + END);
        }
    }
    if k > 64 { None } else { tail(bits, data, table, block, k) }
}

fn byte(step: u64, at: u32) -> usize {
    (step >> at & 0xff) as usize
}

/// One look-up per coefficient, from `k` on.
#[inline(always)]
fn tail<const LANES: bool>(
    bits: &mut Bits,
    data: &[u8],
    table: &Table,
    block: &mut Block<LANES>,
    mut k: usize,
) -> Option<bool> {
    while k < 64 {
        bits.refill(data);
        let e = table.look[(bits.window >> (64 - LOOK)) as usize];
        if e >> 16 != 0 {
            k += (e >> 8 & 15) as usize;
            bits.skip(e & 63);
            if k > 63 {
                return None;
            }
            block.put(k, (e >> 16) as i16);
            k += 1;
            continue;
        }
        let (run, size, length) = match e {
            0 => {
                let (symbol, length) = table.long(bits.window)?;
                (u32::from(symbol >> 4), u32::from(symbol & 15), length)
            }
            e => (e >> 8 & 15, e >> 12, e & 63),
        };
        bits.skip(length);
        if size == 0 {
            if run != 15 {
                break;
            }
            k += 16;
            continue;
        }
        k += run as usize;
        if k > 63 {
            return None;
        }
        block.put(k, bits.number(size) as i16);
        k += 1;
    }
    Some(k > 1)
}
