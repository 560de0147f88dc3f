//! Entropy decoding of baseline JPEG in place of libjpeg's, which is where most of the time of a photo goes.
//!
//! A look-up of [`LOOK`] bits brings run, value and length of most coefficients at once; the bytes are freed of their
//! stuffing beforehand, so that the bit reader need not look for markers. Only what a sound file does is done here: at
//! anything else (an invalid code, a marker where data is expected, no marker at the end) the decoder gives up, and the
//! caller starts over with libjpeg's own, whose judgement of damaged files is Pillow's.

use std::cell::RefCell;
use std::ffi::c_int;
use std::rc::Rc;

use super::layout::{Codes, Coefficients, Decompress};

/// Bits per look-up: 4 KiB per table.
const LOOK: u32 = 10;

/// Where coefficient `k` of the zigzag belongs.
#[rustfmt::skip]
const ZIGZAG: [u8; 64] = [
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// One Huffman table. An entry of `look` is `value << 16 | run << 8 | bits` when the value's bits are in the look-up too,
/// `size << 12 | run << 8 | bits` (of the code alone) when they are not, and 0 for codes longer than [`LOOK`].
struct Table {
    codes: Codes,
    look: [u32; 1 << LOOK],
    /// First left-aligned 16-bit code that is longer than `l` bits.
    limit: [u32; 17],
    /// What to add to a code of `l` bits to get the index of its symbol.
    offset: [i32; 17],
}

impl Table {
    fn new(codes: Codes) -> Self {
        let mut table = Self { codes, look: [0; 1 << LOOK], limit: [0; 17], offset: [0; 17] };
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
    fn long(&self, bits: u64) -> Option<(u8, u32)> {
        let code = (bits >> 48) as u32;
        let length = (LOOK + 1..=16).find(|&l| code < self.limit[l as usize])?;
        let index = (code >> (16 - length)) as i32 + self.offset[length as usize];
        Some((*self.codes.huffval.get(usize::try_from(index).ok()?)?, length))
    }
}

/// The entry for a code of `length` bits that is followed by the `free` bits `rest`.
fn entry(symbol: u8, length: u32, rest: u32, free: u32) -> u32 {
    let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
    if size == 0 || size > free {
        return size << 12 | run << 8 | length;
    }
    let value = extend(u64::from(rest >> (free - size)), size);
    (value as u32) << 16 | run << 8 | (length + size)
}

/// The number that JPEG writes as the `size` bits `raw`.
fn extend(raw: u64, size: u32) -> i32 {
    let raw = raw as i32;
    if raw < 1 << (size - 1) { raw - (1 << size) + 1 } else { raw }
}

/// Tables that this thread has met: most files use the same standard ones.
#[derive(Default)]
struct Spare {
    tables: Vec<Rc<Table>>,
    data: Vec<u8>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

fn table(codes: Codes) -> Rc<Table> {
    SPARE.with_borrow_mut(|spare| {
        if let Some(table) = spare.tables.iter().find(|table| table.codes == codes) {
            return Rc::clone(table);
        }
        // Optimised tables are new in every file; keeping more of them would only cost memory.
        if spare.tables.len() >= 16 {
            spare.tables.clear();
        }
        let table = Rc::new(Table::new(codes));
        spare.tables.push(Rc::clone(&table));
        table
    })
}

/// One block of an MCU.
struct Block {
    component: usize,
    dc: Rc<Table>,
    ac: Rc<Table>,
}

#[derive(Clone, Copy, Default)]
struct Bits {
    /// The next bits, from the top.
    window: u64,
    count: u32,
    /// The next byte of `data`.
    at: usize,
}

/// The decoder of one file.
pub struct Huffman {
    blocks: Vec<Block>,
    bits: Bits,
    last_dc: [i32; 4],
    /// The entropy-coded bytes up to the next marker, without stuffing; `length` of them, then padding.
    data: Vec<u8>,
    length: usize,
    /// The marker behind `data`.
    marker: *const u8,
    restart_interval: u32,
    until_restart: u32,
    next_restart: u8,
    mcus_left: u64,
    /// The file is not for us: libjpeg's own decoder must judge it.
    pub gave_up: bool,
}

const PADDING: usize = 8;

impl Huffman {
    /// Takes over the entropy decoding of `cinfo`; `None` when the file is none that this decoder knows. The pointer is
    /// that of a `Box`, for the caller to free.
    ///
    /// # Safety
    /// `cinfo` was started and no row was read yet; the result must live as long as rows are read.
    pub unsafe fn install(cinfo: *mut Decompress) -> Option<*mut Self> {
        // SAFETY: the caller's promise.
        let info = unsafe { &mut *cinfo };
        let baseline = info.progressive_mode == 0 && info.arith_code == 0 && info.data_precision == 8;
        let whole = (info.Ss, info.Se, info.Ah, info.Al) == (0, 63, 0, 0) && info.comps_in_scan == info.num_components;
        let count = usize::try_from(info.blocks_in_MCU).ok().filter(|&n| n <= info.MCU_membership.len())?;
        if !baseline || !whole {
            return None;
        }
        let mut blocks = Vec::with_capacity(count);
        for &component in &info.MCU_membership[..count] {
            let component = usize::try_from(component).ok()?;
            let described = *info.cur_comp_info.get(component)?;
            // SAFETY: libjpeg set the components of the scan and validated their tables when it started the pass.
            let (dc, ac) = unsafe {
                let described = described.as_ref()?;
                let dc = *info.dc_huff_tbl_ptrs.get(usize::try_from(described.dc_tbl_no).ok()?)?;
                let ac = *info.ac_huff_tbl_ptrs.get(usize::try_from(described.ac_tbl_no).ok()?)?;
                (*dc.as_ref()?, *ac.as_ref()?)
            };
            blocks.push(Block { component, dc: table(dc), ac: table(ac) });
        }
        let data = SPARE.with_borrow_mut(|spare| std::mem::take(&mut spare.data));
        let mut huffman = Self {
            blocks,
            bits: Bits::default(),
            last_dc: [0; 4],
            data,
            length: 0,
            marker: std::ptr::null(),
            restart_interval: info.restart_interval,
            until_restart: info.restart_interval,
            next_restart: 0,
            mcus_left: u64::from(info.MCUs_per_row) * u64::from(info.MCU_rows_in_scan),
            gave_up: false,
        };
        // SAFETY: the source is the whole rest of the file.
        let rest = unsafe { std::slice::from_raw_parts((*info.src).next_input_byte, (*info.src).bytes_in_buffer) };
        huffman.unstuff(rest)?;
        // SAFETY: libjpeg made one when it started.
        let entropy = unsafe { info.entropy.as_mut()? };
        let huffman = Box::into_raw(Box::new(huffman));
        info.client_data = huffman.cast();
        entropy.decode_mcu = decode_mcu;
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("bmi2") {
            entropy.decode_mcu = decode_mcu_bmi2;
        }
        Some(huffman)
    }

    /// Copies the bytes up to the next marker, each `ff 00` as `ff`. `None` when there is no marker.
    fn unstuff(&mut self, bytes: &[u8]) -> Option<()> {
        self.data.clear();
        self.data.reserve(bytes.len().min(1 << 20) + PADDING);
        let mut rest = bytes;
        loop {
            let run = find_ff(rest)?;
            self.data.extend_from_slice(&rest[..run]);
            match rest.get(run + 1)? {
                0 => self.data.push(0xff),
                // Fill bytes are legal and rare.
                0xff => return None,
                _ => {
                    self.marker = rest[run..].as_ptr();
                    break;
                }
            }
            rest = &rest[run + 2..];
        }
        self.length = self.data.len();
        self.data.extend_from_slice(&[0; PADDING]);
        self.bits = Bits::default();
        Some(())
    }

    /// Steps over the expected restart marker.
    fn restart(&mut self, source: &[u8]) -> Option<()> {
        let at = (self.marker as usize).checked_sub(source.as_ptr() as usize)?;
        let rest = source.get(at..)?;
        if *rest.get(1)? != 0xd0 + self.next_restart {
            return None;
        }
        self.next_restart = (self.next_restart + 1) % 8;
        self.last_dc = [0; 4];
        self.until_restart = self.restart_interval;
        self.unstuff(&rest[2..])
    }

    #[inline(always)]
    fn mcu(&mut self, rows: &[*mut Coefficients]) -> Option<()> {
        let mut bits = self.bits;
        let data = self.data.as_slice();
        for (block, &row) in self.blocks.iter().zip(rows) {
            // SAFETY: libjpeg hands over one zeroed block of its own for each block of the MCU.
            let out = unsafe { &mut *row };
            bits.refill(data);
            let e = block.dc.look[(bits.window >> (64 - LOOK)) as usize];
            let difference = if e >> 16 != 0 {
                bits.skip(e & 0xff);
                (e as i32) >> 16
            } else {
                let (size, length) = match e {
                    0 => block.dc.long(bits.window).map(|(symbol, length)| (u32::from(symbol & 15), length))?,
                    e => (e >> 12, e & 0xff),
                };
                bits.skip(length);
                if size == 0 { 0 } else { bits.number(size) }
            };
            let dc = self.last_dc.get_mut(block.component)?;
            *dc += difference;
            out[0] = i16::try_from(*dc).ok()?;
            let mut k = 1;
            while k < 64 {
                bits.refill(data);
                let e = block.ac.look[(bits.window >> (64 - LOOK)) as usize];
                if e >> 16 != 0 {
                    k += (e >> 8 & 15) as usize;
                    bits.skip(e & 0xff);
                    out[usize::from(*ZIGZAG.get(k)?)] = (e >> 16) as i16;
                    k += 1;
                    continue;
                }
                let (run, size, length) = match e {
                    0 => {
                        let (symbol, length) = block.ac.long(bits.window)?;
                        (u32::from(symbol >> 4), u32::from(symbol & 15), length)
                    }
                    e => (e >> 8 & 15, e >> 12, e & 0xff),
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
                out[usize::from(*ZIGZAG.get(k)?)] = bits.number(size) as i16;
                k += 1;
            }
        }
        self.bits = bits;
        // More bits than there were: padding was decoded.
        (8 * bits.at <= 8 * self.length + bits.count as usize).then_some(())
    }
}

impl Drop for Huffman {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        SPARE.with_borrow_mut(|spare| spare.data = data);
    }
}

impl Bits {
    /// At least 32 bits, enough for the longest code (16) and value (15).
    #[inline(always)]
    fn refill(&mut self, data: &[u8]) {
        if self.count >= 32 {
            return;
        }
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
}

/// Index of the first `ff`.
fn find_ff(bytes: &[u8]) -> Option<usize> {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    const LOW: u64 = 0x0101_0101_0101_0101;
    let mut at = 0;
    while let Some(&eight) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let inverted = !u64::from_le_bytes(eight);
        // The lowest byte marked is a zero byte of `inverted`; those above may be false.
        let zeros = inverted.wrapping_sub(LOW) & !inverted & HIGH;
        if zeros != 0 {
            return Some(at + (zeros.trailing_zeros() / 8) as usize);
        }
        at += 8;
    }
    bytes.get(at..)?.iter().position(|&b| b == 0xff).map(|i| at + i)
}

/// libjpeg's `decode_mcu`: 1 when the MCU is decoded, 0 when more data would be needed, which here means: not by us.
///
/// # Safety
/// The object must be one into which [`Huffman::install`] put a decoder that is still there, with the source of `Decoder`;
/// `rows` must have a place for each block of an MCU.
#[inline(always)]
unsafe fn next_mcu(cinfo: *mut Decompress, rows: *mut *mut Coefficients) -> c_int {
    // SAFETY: libjpeg passes its own live object; `install` put a `Huffman` into `client_data` that outlives the reading,
    // and `rows` has one entry per block of an MCU.
    let (info, huffman, rows) = unsafe {
        let huffman = &mut *(*cinfo).client_data.cast::<Huffman>();
        let rows = std::slice::from_raw_parts(rows, huffman.blocks.len());
        (&mut *cinfo, huffman, rows)
    };
    // SAFETY: the source of `Decoder`: the rest of the file.
    let source = unsafe { &mut *info.src };
    // SAFETY: as above.
    let rest = unsafe { std::slice::from_raw_parts(source.next_input_byte, source.bytes_in_buffer) };
    if huffman.restart_interval > 0 && huffman.until_restart == 0 && huffman.restart(rest).is_none() {
        huffman.gave_up = true;
    }
    if huffman.gave_up || huffman.mcus_left == 0 || huffman.mcu(rows).is_none() {
        huffman.gave_up = true;
        return 0;
    }
    huffman.until_restart = huffman.until_restart.wrapping_sub(1);
    huffman.mcus_left -= 1;
    if huffman.mcus_left == 0 {
        // libjpeg reads on from the marker.
        let read = huffman.marker as usize - source.next_input_byte as usize;
        source.next_input_byte = huffman.marker;
        source.bytes_in_buffer -= read;
    }
    1
}

/// # Safety
/// As for [`next_mcu`].
unsafe extern "C-unwind" fn decode_mcu(cinfo: *mut Decompress, rows: *mut *mut Coefficients) -> c_int {
    // SAFETY: libjpeg's call.
    unsafe { next_mcu(cinfo, rows) }
}

/// The same with shifts that leave the flags alone.
///
/// # Safety
/// As for [`next_mcu`], where the processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,bmi2,lzcnt")]
unsafe extern "C-unwind" fn decode_mcu_bmi2(cinfo: *mut Decompress, rows: *mut *mut Coefficients) -> c_int {
    // SAFETY: libjpeg's call; installed only where the instructions are.
    unsafe { next_mcu(cinfo, rows) }
}
