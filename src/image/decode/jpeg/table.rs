//! Huffman tables as the decoder looks them up: one symbol with its value, or two.

#![forbid(unsafe_code)]

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

use super::layout::Codes;

/// Bits per look-up of one symbol: 4 KiB per table.
pub const LOOK: u32 = 10;

/// Bits per look-up of two symbols: 16 KiB per table, of which a file has two.
pub const WIDE: u32 = 11;

/// What a step advances by that ends the block, beyond its coefficients.
pub const END: usize = 96;
/// What a step advances by that is not done: a value outside the look-up follows or, where its size is 0, a longer code.
pub const LONG: usize = 192;
/// How far a step may be when it looks at another symbol.
const SAFE: usize = 16;
/// From which coefficient on there are no steps: their second symbol could be the next block's.
pub const LAST: usize = 64 - SAFE;

/// Of an entry of [`Table::look`]: there is no more to it than what it says.
pub const WHOLE: u32 = 0x80;

/// One Huffman table. An entry of `look` is `value << 16 | run << 8 | WHOLE | bits` when the value's bits are in the look-up
/// too, `size << 12 | run << 8 | bits` (of the code alone) when they are not, and 0 for codes longer than [`LOOK`].
pub struct Table {
    codes: Codes,
    pub look: [u32; 1 << LOOK],
    /// First left-aligned 16-bit code that is longer than `l` bits.
    limit: [u32; 17],
    /// What to add to a code of `l` bits to get the index of its symbol.
    offset: [i32; 17],
    steps: OnceCell<Box<[u64; 1 << WIDE]>>,
    /// Whether an earlier file had it: then more will, and steps pay off.
    pub known: Cell<bool>,
}

impl Table {
    fn new(codes: Codes) -> Self {
        let (steps, known) = (OnceCell::new(), Cell::new(false));
        let mut table = Self { codes, look: [0; 1 << LOOK], limit: [0; 17], offset: [0; 17], steps, known };
        let (mut code, mut index) = (0_u32, 0_usize);
        for length in 1..=16_u32 {
            table.offset[length as usize] = index as i32 - code as i32;
            for _ in 0..codes.bits[length as usize] {
                let symbol = codes.huffval[index & 0xff];
                if length <= LOOK {
                    let free = LOOK - length;
                    for rest in 0..1 << free {
                        let at = (code << free | rest) as usize & ((1 << LOOK) - 1);
                        table.look[at] = entry(symbol, length, rest, free);
                    }
                }
                code += 1;
                index += 1;
            }
            table.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        table
    }

    /// Symbol and length of a code longer than [`LOOK`] bits.
    pub fn long(&self, bits: u64) -> Option<(u8, u32)> {
        let code = (bits >> 48) as u32;
        let length = (LOOK + 1..=16).find(|&l| code < self.limit[l as usize])?;
        let index = (code >> (16 - length)) as i32 + self.offset[length as usize];
        Some((*self.codes.huffval.get(usize::try_from(index).ok()?)?, length))
    }

    /// What the next [`WIDE`] bits say, packed; of tables for which it was made.
    pub fn steps(&self) -> Option<&[u64; 1 << WIDE]> {
        self.steps.get().map(Box::as_ref)
    }

    /// Pays off after some ten kilobytes.
    pub fn make_steps(&self) {
        self.steps.get_or_init(|| {
            let symbols = self.symbols();
            let mut steps = Box::new([0; 1 << WIDE]);
            for (bits, packed) in steps.iter_mut().enumerate() {
                *packed = Lookup::of(bits, &symbols).packed();
            }
            steps
        });
    }

    /// The symbol that each [`WIDE`] bits begin with, and how many bits its code has; 0 where it has more.
    fn symbols(&self) -> Vec<(u8, u32)> {
        let mut symbols = Vec::with_capacity(1 << WIDE);
        let mut index = 0;
        for length in 1..=WIDE {
            for _ in 0..self.codes.bits[length as usize] {
                let after = symbols.len() + (1 << (WIDE - length));
                symbols.resize(after, (self.codes.huffval[index & 0xff], length));
                index += 1;
            }
        }
        symbols.resize(1 << WIDE, (0, 0));
        symbols
    }
}

/// What is to be done at once: two values (or zeros) are written so far behind the next free place, then the place moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lookup {
    bits: u32,
    advance: usize,
    places: [usize; 2],
    values: [i32; 2],
}

impl Lookup {
    fn of(bits: usize, symbols: &[(u8, u32)]) -> Self {
        let mut step = Self::default();
        let mut found = 0;
        while step.advance <= SAFE {
            let free = WIDE - step.bits;
            let rest = bits << step.bits & ((1 << WIDE) - 1);
            let (symbol, length) = symbols[rest];
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            let known = length != 0 && length <= free;
            if known && size == 0 {
                step.bits += length;
                step.advance += if run == 15 { 16 } else { END };
            } else if known && found < 2 && length + size <= free {
                let raw = rest >> (WIDE - length - size) & ((1 << size) - 1);
                step.places[found] = step.advance + run;
                step.values[found] = extend(raw as u64, size);
                step.bits += length + size;
                step.advance += run + 1;
                found += 1;
            } else {
                if step.bits == 0 {
                    // Where the zeros go says what is next.
                    step.places = if known { [run, size as usize] } else { [0, 0] };
                    step.bits = if known { length } else { 0 };
                    step.advance = LONG;
                    return step;
                }
                break;
            }
        }
        // A place that gets no value gets a zero: ahead, where it harms nobody.
        step.places[found..].fill(step.advance % END);
        step
    }

    fn packed(self) -> u64 {
        let value = |i: usize| u64::from(self.values[i] as u16);
        u64::from(self.bits)
            | (self.advance as u64) << 8
            | (self.places[0] as u64) << 16
            | (self.places[1] as u64) << 24
            | value(0) << 32
            | value(1) << 48
    }
}

/// The entry for a code of `length` bits that is followed by the `free` bits `rest`.
fn entry(symbol: u8, length: u32, rest: u32, free: u32) -> u32 {
    let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
    if size == 0 {
        return run << 8 | WHOLE | length;
    }
    if size > free {
        return size << 12 | run << 8 | length;
    }
    let value = extend(u64::from(rest >> (free - size)), size);
    (value as u32) << 16 | run << 8 | WHOLE | (length + size)
}

/// The number that JPEG writes as the `size` bits `raw`.
pub fn extend(raw: u64, size: u32) -> i32 {
    let raw = raw as i32;
    if raw < 1 << (size - 1) { raw - (1 << size) + 1 } else { raw }
}

thread_local! {
    /// Tables that this thread has met: most files use the same standard ones.
    static KNOWN: RefCell<Vec<Rc<Table>>> = RefCell::default();
}

/// The table of these codes.
pub fn table(codes: Codes) -> Rc<Table> {
    KNOWN.with_borrow_mut(|known| {
        if let Some(table) = known.iter().find(|table| table.codes == codes) {
            return Rc::clone(table);
        }
        // Optimised tables are new in every file; keeping more of them would only cost memory.
        if known.len() >= 16 {
            known.clear();
        }
        let table = Rc::new(Table::new(codes));
        known.push(Rc::clone(&table));
        table
    })
}

/// How many tables this thread has met, and how many of them have steps.
#[cfg(test)]
pub fn met() -> (usize, usize) {
    KNOWN.with_borrow(|known| (known.len(), known.iter().filter(|table| table.steps().is_some()).count()))
}
