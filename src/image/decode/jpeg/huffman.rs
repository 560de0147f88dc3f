//! Entropy decoding of baseline JPEG in place of libjpeg's, which is where most of the time of a photo goes.
//!
//! A look-up brings run, value and length of two coefficients at once (`table`); the bytes are freed of their stuffing
//! beforehand, so that the bit reader need not look for markers. Only what a sound file does is done here: at anything
//! else (an invalid code, a marker where data is expected, no marker at the end) the decoder gives up, and the caller
//! starts over with libjpeg's own, whose judgement of damaged files is Pillow's.

use std::cell::RefCell;
use std::ffi::c_int;
use std::rc::Rc;

use super::bits::{Bits, Block};
use super::layout::{Coefficients, Decompress};
use super::table::{Table, table};

thread_local! {
    /// The buffer for the next file.
    static SPARE: RefCell<Vec<u8>> = RefCell::default();
}

/// How a block of an MCU is coded.
struct Coding {
    component: usize,
    dc: Rc<Table>,
    ac: Rc<Table>,
}

/// The decoder of one file.
pub struct Huffman {
    blocks: Vec<Coding>,
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
        // SAFETY: libjpeg's source.
        let large = unsafe { (*info.src).bytes_in_buffer } > 1 << 14;
        let mut blocks = Vec::<Coding>::with_capacity(count);
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
            blocks.push(Coding { component, dc: table(dc), ac: table(ac) });
        }
        // Blocks of one file share tables: none of them makes the others' known.
        for coding in blocks.iter().filter(|coding| large || coding.ac.known.get()) {
            coding.ac.make_steps();
        }
        blocks.iter().for_each(|coding| coding.ac.known.set(true));
        let data = SPARE.take();
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
        if has_bmi2() {
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

    /// The next MCU, and restarts when one is due: to each block one of `rows`. Bits say which blocks have more than their
    /// first coefficient. `None` when it is not sound.
    ///
    /// # Safety
    /// `rows` must be as many as an MCU has blocks, each with room for a [`Block`] of `LANES`, zeroed.
    #[inline(always)]
    pub unsafe fn next<const LANES: bool>(&mut self, source: &[u8], rows: &[*mut i16]) -> Option<u32> {
        if self.restart_interval > 0 && self.until_restart == 0 {
            self.restart(source)?;
        }
        if self.mcus_left == 0 {
            return None;
        }
        self.until_restart = self.until_restart.wrapping_sub(1);
        self.mcus_left -= 1;
        let (mut bits, mut busy) = (self.bits, 0);
        let data = self.data.as_slice();
        for (i, (coding, &row)) in self.blocks.iter().zip(rows).enumerate() {
            let dc = self.last_dc.get_mut(coding.component)?;
            *dc += bits.first(data, &coding.dc)?;
            // SAFETY: the caller's promise.
            let mut block = unsafe { Block::<LANES>::at(row) };
            block.put(0, i16::try_from(*dc).ok()?);
            busy |= u32::from(bits.others(data, &coding.ac, &mut block)?) << i;
        }
        self.bits = bits;
        // More bits than there were: padding was decoded.
        (8 * bits.at <= 8 * self.length + bits.count as usize).then_some(busy)
    }
}

/// What `baseline` asks.
#[cfg(target_arch = "x86_64")]
impl Huffman {
    /// Blocks of an MCU.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the last MCU was decoded, and nothing is behind it.
    pub fn at_end(&self, source: &[u8]) -> bool {
        let at = (self.marker as usize).checked_sub(source.as_ptr() as usize);
        let marker = at.and_then(|at| source.get(at..at + 2));
        self.mcus_left == 0 && marker == Some(&[0xff, 0xd9])
    }
}

impl Drop for Huffman {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        SPARE.set(data);
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
        let rows = std::slice::from_raw_parts(rows.cast::<*mut i16>(), huffman.blocks.len());
        (&mut *cinfo, huffman, rows)
    };
    // SAFETY: the source of `Decoder`: the rest of the file.
    let source = unsafe { &mut *info.src };
    // SAFETY: as above.
    let rest = unsafe { std::slice::from_raw_parts(source.next_input_byte, source.bytes_in_buffer) };
    // SAFETY: libjpeg hands over one zeroed block of its own for each block of the MCU.
    if huffman.gave_up || unsafe { huffman.next::<false>(rest, rows) }.is_none() {
        huffman.gave_up = true;
        return 0;
    }
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

/// Whether the instructions of [`decode_mcu_bmi2`] are there; a virtual machine may hide each of them.
#[cfg(target_arch = "x86_64")]
pub fn has_bmi2() -> bool {
    is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("lzcnt")
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
