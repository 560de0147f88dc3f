//! The chunks around the pixels: Pillow refuses a file for some of them, whatever they mean for the picture.

#![forbid(unsafe_code)]

use flate2::{Decompress, FlushDecompress};

use crate::error::{Error, Result};
use crate::image::decode::limits::truncated;

/// Pillow's `MAX_TEXT_CHUNK` and `MAX_TEXT_MEMORY`.
const MOST_TEXT: usize = 1 << 20;
const MOST_TEXTS: usize = 64 << 20;

/// Length, name and the rest from the data on.
pub fn chunk(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    let (length, name) = head.split_at(4);
    Some((length.iter().fold(0, |n, &b| n << 8 | b as usize), name, rest))
}

/// Whether a chunk in front of the pixels announces frames.
pub fn is_animated(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some((length, name, _)) = bytes.get(at..).and_then(chunk)
        && name != b"IDAT"
    {
        if name == b"acTL" {
            return true;
        }
        at = at.saturating_add(12 + length);
    }
    false
}

/// What the chunks so far have said.
#[derive(Default)]
struct Chunks {
    size: [u32; 2],
    /// 0 gray, 2 colour, 3 palette, 4 and 6 with alpha.
    color: u8,
    palette: bool,
    /// Frames of an animation, and how many frames came so far.
    frames: Option<u32>,
    sequence: Option<u32>,
    texts: usize,
}

/// Looks at every chunk as far as Pillow does, at checksums up to the pixels: a wrong palette or size would go unnoticed.
/// Gives the position of the first chunk of pixels.
///
/// # Errors
/// Where Pillow raises.
pub fn check(bytes: &[u8]) -> Result<usize> {
    let mut seen = Chunks::default();
    let cut = || truncated("PNG", bytes.len());
    let mut at = 8;
    loop {
        let (length, name, rest) = chunk(&bytes[at..]).ok_or_else(cut)?;
        if !is_name(name) {
            return Err(broken(name, "is no name of a chunk"));
        }
        if name == b"IDAT" {
            check_behind(bytes, at + 12 + length, &mut seen)?;
            return Ok(at);
        }
        if name == b"fdAT" || name == b"IEND" || (name == b"IHDR" && at != 8) {
            return Err(broken(name, "comes before the pixels, or twice"));
        }
        let (data, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        let sum = rest.first_chunk::<4>().ok_or_else(cut)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(name);
        crc.update(data);
        if crc.finalize() != u32::from_be_bytes(*sum) {
            return Err(broken(name, "does not match its checksum"));
        }
        look(name, data, &mut seen)?;
        if name == b"fcTL" && [4, 8, 12, 16].map(|at| number(data, at)) != [seen.size[0], seen.size[1], 0, 0] {
            return Err(broken(name, "makes the first frame a part of the picture, which is not supported"));
        }
        at += 12 + length;
    }
}

/// From the chunk behind the first one of pixels on. What is no chunk ends the file.
fn check_behind(bytes: &[u8], mut at: usize, seen: &mut Chunks) -> Result<()> {
    while let Some((length, name, rest)) = bytes.get(at..).and_then(chunk)
        && is_name(name)
        && name != b"IEND"
    {
        if name == b"fcTL" && seen.frames.is_some_and(|frames| frames > 1) {
            return Ok(());
        }
        match rest.get(..length) {
            Some(data) => look(name, data, seen)?,
            // Pixels too: either those before were enough, then Pillow refuses the file, or it may be asked how far they go.
            None => return Err(truncated("PNG", bytes.len())),
        }
        at += 12 + length;
    }
    Ok(())
}

fn is_name(name: &[u8]) -> bool {
    name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
}

fn number(data: &[u8], at: usize) -> u32 {
    data.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |n| u32::from_be_bytes(*n))
}

/// What Pillow minds in a chunk.
fn look(name: &[u8], data: &[u8], seen: &mut Chunks) -> Result<()> {
    let least = match (name, seen.color) {
        (b"IHDR", _) => 13,
        (b"tRNS", 0) => 2,
        (b"tRNS", 2) => 6,
        (b"gAMA", _) | (b"fdAT", _) => 4,
        (b"cHRM", _) => 32,
        (b"sRGB", _) => 1,
        (b"pHYs", _) => 9,
        (b"acTL", _) => 8,
        (b"fcTL", _) => 26,
        _ => 0,
    };
    if data.len() < least {
        return Err(broken(name, "is too short"));
    }
    match name {
        b"IHDR" if data[11] != 0 => return Err(broken(name, "has an unknown filter")),
        b"IHDR" => (seen.size, seen.color) = ([number(data, 0), number(data, 4)], data[9]),
        b"PLTE" if seen.color == 3 && (seen.palette || data.len() > 768) => {
            return Err(broken(name, "has more than 256 colours, or is the second one"));
        }
        b"PLTE" => seen.palette = true,
        b"acTL" if seen.frames.is_some() => seen.frames = None,
        b"acTL" => seen.frames = Some(number(data, 0)).filter(|frames| (1..=0x8000_0000).contains(frames)),
        b"fcTL" | b"fdAT" => {
            if number(data, 0) != seen.sequence.map_or(0, |last| last.wrapping_add(1))
                || (name == b"fdAT" && seen.sequence.is_none())
            {
                return Err(broken(name, "is out of order"));
            }
            seen.sequence = Some(number(data, 0));
            let ends = |from, length, limit| {
                u64::from(number(data, from)) + u64::from(number(data, length)) > u64::from(limit)
            };
            if name == b"fcTL" && (ends(12, 4, seen.size[0]) || ends(16, 8, seen.size[1])) {
                return Err(broken(name, "sticks out"));
            }
        }
        b"iCCP" => {
            // Without a name the first byte counts.
            let method = data.iter().position(|&b| b == 0).map_or(0, |end| end + 1);
            if data.get(method) != Some(&0) || inflated(&data[method + 1..]) >= MOST_TEXT {
                return Err(broken(name, "is unknown or too long"));
            }
        }
        b"tEXt" | b"zTXt" | b"iTXt" => {
            seen.texts += text(name, data)?;
            if seen.texts > MOST_TEXTS {
                return Err(broken(name, "is too much text"));
            }
        }
        _ => {}
    }
    Ok(())
}

/// How long the text of a chunk is.
fn text(name: &[u8], data: &[u8]) -> Result<usize> {
    let behind = data.iter().position(|&b| b == 0).map_or(&[][..], |end| &data[end + 1..]);
    let packed = match (name, behind) {
        (b"zTXt", [method, ..]) if *method != 0 => return Err(broken(name, &format!("has compression {method}"))),
        (b"zTXt", [_, packed @ ..]) => packed,
        (b"iTXt", [flag, 0, rest @ ..]) if *flag != 0 => rest.splitn(3, |&b| b == 0).nth(2).unwrap_or(&[]),
        _ => return Ok(data.len()),
    };
    match inflated(packed) {
        MOST_TEXT.. => Err(broken(name, "is too long")),
        length => Ok(length),
    }
}

/// How much comes out of compressed data, up to the most that is allowed; broken data does not count.
fn inflated(data: &[u8]) -> usize {
    // Nothing becomes more than 1032 times as long.
    if data.len() * 1032 < MOST_TEXT {
        return 0;
    }
    let mut stream = Decompress::new(true);
    let mut part = [0; 4096];
    loop {
        let before = (stream.total_in(), stream.total_out());
        let rest = &data[before.0 as usize..];
        let outcome = stream.decompress(rest, &mut part, FlushDecompress::None);
        let out = stream.total_out() as usize;
        if out >= MOST_TEXT || outcome.is_err() || (stream.total_in(), stream.total_out()) == before {
            return if outcome.is_err() { 0 } else { out };
        }
    }
}

fn broken(name: &[u8], what: &str) -> Error {
    Error::decode(format_args!("broken PNG: its {} chunk {what}", String::from_utf8_lossy(name).escape_debug()))
}
