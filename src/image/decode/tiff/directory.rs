//! The first directory of a TIFF, and whether it describes a picture that the crate reads as Pillow does.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::image::decode::limits::truncated;

// Numbers of the tags.
pub const ORIENTATION: u64 = 274;
pub const COLOR_MAP: u64 = 320;
pub const EXTRA_SAMPLES: u64 = 338;
pub const XMP: u64 = 700;
const PHOTOMETRIC: u64 = 262;
const WINDOWS_MEDIA_PHOTO: u64 = 0xbc01;

/// Photometric interpretation of colours by index.
const PALETTE: u64 = 3;

/// Where a tag keeps its values, which lie in the file.
struct Tag {
    tag: u64,
    kind: u64,
    count: usize,
    at: usize,
}

pub struct Directory<'a> {
    bytes: &'a [u8],
    little: bool,
    entries: Vec<Tag>,
}

/// What the tags say about the samples.
pub struct Page {
    pub photometric: u64,
    /// 1 unsigned, 2 signed, 3 float.
    pub format: u64,
    pub bits: u64,
    pub samples: u64,
    pub extra: Vec<u64>,
    pub compression: u64,
}

impl Page {
    pub fn is_indexed(&self) -> bool {
        self.photometric == PALETTE
    }

    /// As many bytes as one of the file's can become at most.
    pub fn expansion(&self) -> u64 {
        match self.compression {
            1 => 1,
            // Runs of 128 in two bytes.
            32773 => 64,
            8 | 32946 => 1032,
            // Strings of at most 4096 in 12 bits.
            5 => 2731,
            // A white line of 65535 pixels is a bit.
            _ => 65536,
        }
    }
}

impl<'a> Directory<'a> {
    /// # Errors
    /// When it is not there, names a tag twice, or announces values that the file does not have: the crate takes memory
    /// for as many as are announced.
    pub fn first(bytes: &'a [u8]) -> Result<Self> {
        let little = bytes.starts_with(b"II");
        let big = bytes.get(if little { 2 } else { 3 }) == Some(&b'+');
        if big && !little {
            return Err(unsupported("big offsets in this byte order"));
        }
        let mut directory = Self { bytes, little, entries: Vec::new() };
        // Sizes of offsets and counts, of the number of entries, and of an entry.
        let (wide, head, entry) = if big { (8, 8, 20) } else { (4, 2, 12) };
        let cut = || truncated("TIFF", bytes.len());
        let start = directory.offset(if big { 8 } else { 4 }, wide).ok_or_else(cut)?;
        let count = directory.offset(start, head).ok_or_else(cut)?;
        for i in 0..count {
            let at = start + head + i * entry;
            let (tag, kind, count, inline) = (|| {
                Some((
                    directory.number(at, 2)?,
                    directory.number(at + 2, 2)?,
                    directory.offset(at + 4, wide)?,
                    at + 4 + wide,
                ))
            })()
            .ok_or_else(cut)?;
            let length = count.checked_mul(size_of_kind(kind)).filter(|length| *length <= bytes.len());
            let length = length.ok_or_else(|| {
                Error::decode(format_args!(
                    "broken TIFF: its tag {tag} announces {count} values, the file has {} bytes",
                    bytes.len()
                ))
            })?;
            let at = if length <= wide { inline } else { directory.offset(inline, wide).ok_or_else(cut)? };
            if at.checked_add(length).is_none_or(|end| end > bytes.len()) {
                return Err(Error::decode(format_args!("broken TIFF: its tag {tag} lies behind the end of the file")));
            }
            if directory.entries.iter().any(|other| other.tag == tag) {
                return Err(unsupported(format_args!("tag {tag} twice")));
            }
            directory.entries.push(Tag { tag, kind, count, at });
        }
        Ok(directory)
    }

    fn number(&self, at: usize, size: usize) -> Option<u64> {
        let field = self.bytes.get(at..at.checked_add(size)?)?;
        let join = |n: u64, &b: &u8| n << 8 | u64::from(b);
        Some(if self.little { field.iter().rev().fold(0, join) } else { field.iter().fold(0, join) })
    }

    fn offset(&self, at: usize, size: usize) -> Option<usize> {
        usize::try_from(self.number(at, size)?).ok().filter(|offset| *offset <= self.bytes.len())
    }

    fn entry(&self, tag: u64) -> Option<&Tag> {
        self.entries.iter().find(|entry| entry.tag == tag)
    }

    /// The whole numbers of a tag, `None` where it is missing.
    ///
    /// # Errors
    /// When they are of another kind.
    pub fn numbers(&self, tag: u64) -> Result<Option<Vec<u64>>> {
        let Some(entry) = self.entry(tag) else { return Ok(None) };
        if !matches!(entry.kind, 3 | 4 | 16) || entry.count == 0 {
            return Err(unsupported(format_args!("tag {tag} of kind {} with {} values", entry.kind, entry.count)));
        }
        let size = size_of_kind(entry.kind);
        Ok((0..entry.count).map(|i| self.number(entry.at + i * size, size)).collect())
    }

    /// The one number of a tag, `default` where it is missing.
    fn one(&self, tag: u64, default: u64) -> Result<u64> {
        match self.numbers(tag)?.as_deref() {
            None => Ok(default),
            Some(&[value]) => Ok(value),
            Some(values) => Err(unsupported(format_args!("{} values of tag {tag}", values.len()))),
        }
    }

    /// The bytes of a tag.
    pub fn data(&self, tag: u64) -> Option<&'a [u8]> {
        let entry = self.entry(tag)?;
        self.bytes.get(entry.at..entry.at + entry.count * size_of_kind(entry.kind))
    }

    /// Where the file keeps its photometric interpretation.
    pub fn photometric_at(&self) -> Option<usize> {
        self.entry(PHOTOMETRIC).filter(|entry| entry.kind == 3).map(|entry| entry.at)
    }

    pub fn orientation(&self) -> Result<Option<u64>> {
        self.entry(ORIENTATION).map(|_| self.one(ORIENTATION, 1)).transpose()
    }

    /// Width, height and layout of the samples.
    ///
    /// # Errors
    /// For everything that is not known to be read as Pillow reads it.
    pub fn layout(&self) -> Result<(u64, u64, Page)> {
        let (width, height) = (self.one(256, 0)?, self.one(257, 0)?);
        let same = |tag: u64, default: u64| -> Result<(u64, usize)> {
            let values = self.numbers(tag)?.unwrap_or(vec![default]);
            match values.iter().all(|value| *value == values[0]) {
                true => Ok((values[0], values.len())),
                false => Err(unsupported(format_args!("different values {values:?} of tag {tag}"))),
            }
        };
        let ((bits, bit_counts), (format, _)) = (same(258, 1)?, same(339, 1)?);
        let layout = Page {
            photometric: self.one(PHOTOMETRIC, u64::MAX)?,
            format,
            bits,
            samples: self.one(277, 1)?,
            extra: self.numbers(EXTRA_SAMPLES)?.unwrap_or_default(),
            compression: self.one(259, 1)?,
        };
        if bit_counts != 1 && bit_counts as u64 != layout.samples {
            return Err(unsupported(format_args!("{bit_counts} numbers of bits for {} samples", layout.samples)));
        }
        // Bits from the other end; planes; and how a row was made smaller.
        let (fill_order, planes, predictor) = (self.one(266, 1)?, self.one(284, 1)?, self.one(317, 1)?);
        let compressed = matches!(layout.compression, 5 | 8 | 32946);
        let predicted = match predictor {
            1 => true,
            2 => compressed && matches!(layout.bits, 8 | 16) && layout.format != 3,
            _ => false,
        };
        let compression = compressed
            || matches!(layout.compression, 1 | 32773)
            || (layout.compression == 4 && (layout.bits, layout.samples) == (1, 1) && !layout.is_indexed());
        let plain = fill_order == 1 && planes == 1 && self.entry(WINDOWS_MEDIA_PHOTO).is_none();
        // Pillow swaps the bytes of signed and float samples once more behind libtiff.
        let swapped = !self.little && layout.format != 1 && layout.compression != 1;
        if swapped || !(plain && predicted && compression && is_known(&layout, self.little)) {
            return Err(unsupported(format_args!(
                "photometric interpretation {}, compression {}, {} samples of {} bits (format {}, extra {:?}), fill order \
                 {fill_order}, planar configuration {planes} and predictor {predictor}",
                layout.photometric, layout.compression, layout.samples, layout.bits, layout.format, layout.extra
            )));
        }
        Ok((width, height, layout))
    }
}

/// The layouts that both sides read, and read alike.
fn is_known(layout: &Page, little: bool) -> bool {
    let (bits, format) = (layout.bits, layout.format);
    match (layout.photometric, layout.samples, layout.extra.as_slice()) {
        // White or black is zero. Pillow inverts only up to 8 bits, and knows 32 unsigned ones in one byte order.
        (0, 1, []) => format == 1 && matches!(bits, 1 | 2 | 4 | 8),
        (1, 1, []) => match format {
            1 => matches!(bits, 1 | 2 | 4 | 8 | 16) || (bits == 32 && little),
            2 => matches!(bits, 16 | 32),
            3 => bits == 32,
            _ => false,
        },
        (1, 2, [2]) => (format, bits) == (1, 8),
        (2, 3, []) | (2, 4, [] | [1] | [2]) => format == 1 && matches!(bits, 8 | 16),
        (PALETTE, 1, []) => format == 1 && matches!(bits, 1 | 2 | 4 | 8),
        (5, 4, []) => (format, bits) == (1, 8),
        _ => false,
    }
}

fn size_of_kind(kind: u64) -> usize {
    match kind {
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16..=18 => 8,
        _ => 1,
    }
}

pub fn unsupported(what: impl std::fmt::Display) -> Error {
    Error::unsupported(format_args!("TIFF with {what} is not supported: convert the file"))
}
