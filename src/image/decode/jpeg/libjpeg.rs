//! libjpeg's own interface, for what TurboJPEG's hides: a source that can say "no more bytes".
//!
//! Pillow raises exactly when libjpeg asks for bytes the file does not have. TurboJPEG invents an end marker there and
//! reports it as one warning among others, of which only the first is kept; a suspending source reports it every time.

use std::ffi::{c_int, c_long, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;

use super::baseline;
use super::entropy::Entropy;
use super::huffman::Huffman;
use super::layout::{
    Decompress, ErrorManager, JCS_EXT_RGBX, JCS_YCbCr, JMSG_LENGTH_MAX, JPEG_HEADER_OK, JPEG_LIB_VERSION,
    JPEG_SUSPENDED, SourceManager,
};

// The library itself: libturbojpeg.a carries the libjpeg functions declared below.
use turbojpeg as _;

/// Rows handed over per call; libjpeg returns at most one row group (4) of them at a time.
const ROWS: usize = 8;

unsafe extern "C-unwind" {
    fn jpeg_std_error(err: *mut ErrorManager) -> *mut ErrorManager;
    fn jpeg_CreateDecompress(cinfo: *mut Decompress, version: c_int, size: usize);
    fn jpeg_destroy_decompress(cinfo: *mut Decompress);
    fn jpeg_read_header(cinfo: *mut Decompress, require_image: c_int) -> c_int;
    fn jpeg_start_decompress(cinfo: *mut Decompress) -> c_int;
    fn jpeg_read_scanlines(cinfo: *mut Decompress, rows: *mut *mut u8, count: c_uint) -> c_uint;
    fn jpeg_finish_decompress(cinfo: *mut Decompress) -> c_int;
    fn jpeg_resync_to_restart(cinfo: *mut Decompress, desired: c_int) -> c_int;
}

/// What libjpeg said when it gave up; carried through its C frames as an unwind payload.
struct Fatal(String);

/// # Safety
/// For libjpeg, with its own live object.
unsafe extern "C-unwind" fn error_exit(cinfo: *mut Decompress) {
    let mut text = [0u8; JMSG_LENGTH_MAX + 1];
    // SAFETY: libjpeg passes its own live object; format_message writes at most JMSG_LENGTH_MAX bytes and a NUL.
    unsafe {
        if let Some(format) = (*(*cinfo).err).format_message {
            format(cinfo, text.as_mut_ptr().cast());
        }
    }
    let end = text.iter().position(|&b| b == 0).unwrap_or(0);
    // libjpeg requires that this function never returns. Its frames hold nothing that needs dropping.
    resume_unwind(Box::new(Fatal(String::from_utf8_lossy(&text[..end]).into_owned())))
}

/// # Safety
/// For libjpeg; any pointer will do.
unsafe extern "C-unwind" fn ignore(_: *mut Decompress) {}

/// # Safety
/// For libjpeg; any pointer will do.
unsafe extern "C-unwind" fn suspend(_: *mut Decompress) -> c_int {
    0
}

/// # Safety
/// For libjpeg, with its own live object, whose source is that of [`Decoder`].
unsafe extern "C-unwind" fn skip(cinfo: *mut Decompress, count: c_long) {
    // SAFETY: libjpeg passes its own live object, whose source is the one of `Decoder`; the pointer stays inside the
    // file because the step is capped by what is left.
    unsafe {
        let source = &mut *(*cinfo).src;
        let step = usize::try_from(count).unwrap_or(0).min(source.bytes_in_buffer);
        source.next_input_byte = source.next_input_byte.add(step);
        source.bytes_in_buffer -= step;
    }
}

/// Why there are no pixels.
pub enum JpegError {
    /// libjpeg wanted more bytes than the file has.
    Truncated,
    /// libjpeg's own words.
    Corrupt(String),
    /// libjpeg got none; it does not say how much it wanted.
    Memory,
}

/// What the file says about itself.
pub struct JpegHeader {
    pub width: usize,
    pub height: usize,
    pub components: usize,
    pub precision: usize,
    pub arithmetic: bool,
}

/// One JPEG being decoded. Boxed parts: libjpeg keeps their addresses.
pub struct Decoder<'a> {
    cinfo: Box<Decompress>,
    _error: Box<ErrorManager>,
    source: Box<SourceManager>,
    created: bool,
    /// Ours to free; null when libjpeg decodes alone.
    huffman: *mut Huffman,
    _bytes: std::marker::PhantomData<&'a [u8]>,
}

impl<'a> Decoder<'a> {
    pub fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        // SAFETY: both structs consist of integers, floats, raw pointers and nullable functions: zeros are valid.
        let (mut error, mut cinfo) =
            unsafe { (Box::new(std::mem::zeroed::<ErrorManager>()), Box::new(std::mem::zeroed::<Decompress>())) };
        let source = Box::new(SourceManager {
            next_input_byte: bytes.as_ptr(),
            bytes_in_buffer: bytes.len(),
            init_source: Some(ignore),
            fill_input_buffer: Some(suspend),
            skip_input_data: Some(skip),
            resync_to_restart: Some(jpeg_resync_to_restart),
            term_source: Some(ignore),
        });
        // SAFETY: jpeg_std_error only fills the struct.
        cinfo.err = unsafe { jpeg_std_error(&raw mut *error) };
        error.error_exit = Some(error_exit);
        error.output_message = Some(ignore);
        let mut decoder = Self {
            cinfo,
            _error: error,
            source,
            created: false,
            huffman: null_mut(),
            _bytes: std::marker::PhantomData,
        };
        decoder.call(|cinfo| {
            // SAFETY: the size is that of the struct behind the pointer; libjpeg checks it against its own.
            unsafe { jpeg_CreateDecompress(cinfo, JPEG_LIB_VERSION, size_of::<Decompress>()) }
        })?;
        decoder.created = true;
        decoder.cinfo.src = &raw mut *decoder.source;
        Ok(decoder)
    }

    /// Runs a libjpeg call; its fatal error comes back as a value.
    fn call<T>(&mut self, work: impl FnOnce(*mut Decompress) -> T) -> Result<T, JpegError> {
        let cinfo = &raw mut *self.cinfo;
        catch_unwind(AssertUnwindSafe(|| work(cinfo))).map_err(|payload| match payload.downcast::<Fatal>() {
            Ok(fatal) if fatal.0.starts_with("Insufficient memory") => JpegError::Memory,
            Ok(fatal) => JpegError::Corrupt(fatal.0),
            Err(other) => resume_unwind(other),
        })
    }

    pub fn header(&mut self) -> Result<JpegHeader, JpegError> {
        loop {
            // SAFETY: created by `new`, with a source that lives as long as `self`.
            match self.call(|cinfo| unsafe { jpeg_read_header(cinfo, 0) })? {
                JPEG_SUSPENDED => return Err(JpegError::Truncated),
                JPEG_HEADER_OK => break,
                _tables_only => {}
            }
        }
        Ok(JpegHeader {
            width: self.cinfo.image_width as usize,
            height: self.cinfo.image_height as usize,
            components: usize::try_from(self.cinfo.num_components).unwrap_or(0),
            precision: usize::try_from(self.cinfo.data_precision).unwrap_or(0),
            arithmetic: self.cinfo.arith_code != 0,
        })
    }

    /// Decodes at one `denominator`th of width and height (1, 2, 4 or 8); returns both.
    pub fn scale(&mut self, denominator: usize) -> (usize, usize) {
        let (width, height) = (self.cinfo.image_width as usize, self.cinfo.image_height as usize);
        self.cinfo.scale_num = 1;
        self.cinfo.scale_denom = u32::try_from(denominator).unwrap_or(1);
        (width.div_ceil(denominator), height.div_ceil(denominator))
    }

    /// All rows, four bytes per pixel, into `pixels` of exactly `4 * width * height` bytes, with libjpeg alone.
    pub fn pixels(&mut self, color_space: c_int, pixels: &mut [u8]) -> Result<(), JpegError> {
        self.start(color_space)?;
        self.rows(pixels)
    }

    /// [`Decoder::pixels_fast`], if the picture is not one that `baseline` decodes without libjpeg.
    pub fn pixels_whole(&mut self, color_space: c_int, pixels: &mut [u8]) -> Result<Option<Entropy>, JpegError> {
        match self.usual(color_space) {
            Some(quants) => Ok(self.whole(&quants, pixels).map(|()| Entropy::Whole)),
            None => self.pixels_fast(color_space, pixels),
        }
    }

    /// [`Decoder::pixels`] with our own entropy decoder. Whether it was used: it does not know all kinds of JPEG. `None`
    /// when it met something unsound, which a new decoder without it has to judge.
    pub fn pixels_fast(&mut self, color_space: c_int, pixels: &mut [u8]) -> Result<Option<Entropy>, JpegError> {
        self.start(color_space)?;
        // SAFETY: started just now; `self` keeps the result until libjpeg's object is destroyed.
        self.huffman = unsafe { Huffman::install(&raw mut *self.cinfo) }.unwrap_or(null_mut());
        let outcome = self.rows(pixels);
        // SAFETY: null or alive until `self` is dropped.
        match unsafe { self.huffman.as_ref() } {
            Some(huffman) if huffman.gave_up => Ok(None),
            Some(_) => outcome.map(|()| Some(Entropy::Own)),
            None => outcome.map(|()| Some(Entropy::Libjpeg)),
        }
    }

    /// The quantization of a picture that `baseline` decodes.
    fn usual(&self, color_space: c_int) -> Option<[[u16; 64]; 3]> {
        let info = &self.cinfo;
        let kind = (info.jpeg_color_space, color_space, info.num_components) == (JCS_YCbCr, JCS_EXT_RGBX, 3);
        let baseline = info.progressive_mode == 0 && info.arith_code == 0 && info.scale_num == info.scale_denom;
        // libjpeg repeats the chroma of narrower ones.
        if !kind || !baseline || info.image_width < 5 || info.comps_in_scan != 3 || !baseline::available() {
            return None;
        }
        let mut quants = [[0; 64]; 3];
        for (i, (quant, side)) in (0..).zip(quants.iter_mut().zip([2, 1, 1])) {
            // SAFETY: the header has been read, to the first scan's.
            let component = unsafe { info.cur_comp_info[i as usize].as_ref() }?;
            if (component.component_index, component.h_samp_factor, component.v_samp_factor) != (i, side, side) {
                return None;
            }
            let table = *info.quant_tbl_ptrs.get(usize::try_from(component.quant_tbl_no).ok()?)?;
            // SAFETY: null or libjpeg's.
            *quant = unsafe { table.as_ref() }?.quantval;
        }
        Some(quants)
    }

    /// The [`Decoder::usual`] picture; `None` when it is not sound.
    fn whole(&mut self, quants: &[[u16; 64]; 3], pixels: &mut [u8]) -> Option<()> {
        // No upsampling and conversion of libjpeg's.
        self.cinfo.raw_data_out = 1;
        self.start(JCS_EXT_RGBX).ok()?;
        // SAFETY: started just now; `self` keeps the result until libjpeg's object is destroyed.
        self.huffman = unsafe { Huffman::install(&raw mut *self.cinfo) }?;
        // SAFETY: alive until `self` is dropped; the source is the rest of the file.
        let (huffman, source) = unsafe {
            let source = std::slice::from_raw_parts(self.source.next_input_byte, self.source.bytes_in_buffer);
            (&mut *self.huffman, source)
        };
        let size = (self.cinfo.image_width as usize, self.cinfo.image_height as usize);
        baseline::decode(huffman, source, quants, size, pixels)
    }

    fn start(&mut self, color_space: c_int) -> Result<(), JpegError> {
        self.cinfo.out_color_space = color_space;
        // SAFETY: the header has been read and the file's bytes outlive `self`.
        if self.call(|cinfo| unsafe { jpeg_start_decompress(cinfo) })? == 0 {
            return Err(JpegError::Truncated);
        }
        Ok(())
    }

    fn rows(&mut self, pixels: &mut [u8]) -> Result<(), JpegError> {
        let stride = 4 * self.cinfo.output_width as usize;
        let height = self.cinfo.output_height as usize;
        if self.cinfo.output_components != 4 || pixels.len() != stride * height {
            return Err(JpegError::Corrupt("the size changed while decoding".into()));
        }
        let mut y = 0;
        while y < height {
            let mut rows = [null_mut::<u8>(); ROWS];
            let count = ROWS.min(height - y);
            for (row, line) in rows.iter_mut().zip(pixels[y * stride..].chunks_exact_mut(stride)) {
                *row = line.as_mut_ptr();
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most ROWS")]
            // SAFETY: `count` rows of `stride` bytes each are writable; libjpeg writes no further than its own width.
            let done = self.call(|cinfo| unsafe { jpeg_read_scanlines(cinfo, rows.as_mut_ptr(), count as c_uint) })?;
            if done == 0 {
                return Err(JpegError::Truncated);
            }
            y += done as usize;
        }
        // Errors behind the last scan are errors in Pillow too; a missing end marker is not.
        // SAFETY: all rows have been read.
        self.call(|cinfo| unsafe { jpeg_finish_decompress(cinfo) }).map(|_| ())
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        if self.created {
            // SAFETY: created once, destroyed once; destroying cannot fail.
            unsafe { jpeg_destroy_decompress(&raw mut *self.cinfo) }
        }
        if !self.huffman.is_null() {
            // SAFETY: made by `Box::into_raw`, and libjpeg does not call it any more.
            drop(unsafe { Box::from_raw(self.huffman) });
        }
    }
}
