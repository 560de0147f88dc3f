//! Which way up the camera was held: the orientation tag, where Pillow's `getexif` looks for it.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::io::Read;

use super::format::Format;
use super::png;

const PREFIX: &[u8] = b"Exif\0\0";
const XMP_PREFIX: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
/// Where a compressed text chunk is given up: orientation stands in the first directory.
const MOST_TEXT: u64 = 1 << 20;

/// 1 (upright) to 8, as in the EXIF standard; 1 where nothing is said or TIFF has applied it already.
pub fn orientation(bytes: &[u8], format: Format) -> u8 {
    let mut found = Found::default();
    match format {
        Format::Jpeg => jpeg_segments(bytes, &mut found),
        Format::Png => png_chunks(bytes, &mut found),
        Format::WebP => webp_chunks(bytes, &mut found),
        Format::Gif | Format::Bmp | Format::Tiff | Format::Pnm => {}
    }
    let said = found.exif.as_deref().and_then(in_directory).or_else(|| found.xmp.as_deref().and_then(in_xmp));
    said.filter(|value| (1..=8).contains(value)).unwrap_or(1)
}

#[derive(Default)]
struct Found<'a> {
    exif: Option<Cow<'a, [u8]>>,
    xmp: Option<Cow<'a, [u8]>>,
}

fn jpeg_segments<'a>(bytes: &'a [u8], found: &mut Found<'a>) {
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        at += 1;
        match marker {
            // Fill bytes in front of a marker.
            0xff => continue,
            // Start of scan, end of image: nothing but pixels follows.
            0xda | 0xd9 => return,
            0x01 | 0xd0..=0xd8 => {
                at += 1;
                continue;
            }
            _ => {}
        }
        at += 1;
        let Some(length) = bytes.get(at..at + 2).map(|n| usize::from(n[0]) << 8 | usize::from(n[1])) else { return };
        let Some(segment) = bytes.get(at + 2..at + length.max(2)) else { return };
        if marker == 0xe1 && segment.starts_with(PREFIX) {
            match &mut found.exif {
                // A second segment continues the first.
                Some(exif) => exif.to_mut().extend_from_slice(&segment[PREFIX.len()..]),
                None => found.exif = Some(segment.into()),
            }
        } else if marker == 0xe1 && segment.starts_with(XMP_PREFIX) {
            found.xmp = Some(segment[XMP_PREFIX.len()..].into());
        }
        at += length.max(2);
    }
}

fn png_chunks<'a>(bytes: &'a [u8], found: &mut Found<'a>) {
    let mut raw_profile = None;
    let mut at = 8;
    while let Some((length, name, rest)) = bytes.get(at..).and_then(png::chunk) {
        let Some(data) = rest.get(..length) else { break };
        match name {
            b"eXIf" => found.exif = Some(data.into()),
            b"tEXt" => raw_profile = keyword(data, b"Raw profile type exif").map(Cow::from).or(raw_profile),
            b"zTXt" => {
                let text = keyword(data, b"Raw profile type exif").and_then(|text| inflate(text.get(1..)?));
                raw_profile = text.map(Cow::from).or(raw_profile);
            }
            b"iTXt" => found.xmp = keyword(data, b"XML:com.adobe.xmp").and_then(international).or(found.xmp.take()),
            _ => {}
        }
        at += 12 + length;
    }
    if found.exif.is_none() {
        found.exif = raw_profile.and_then(|text| hexadecimal(&text)).map(Cow::from);
    }
}

/// What follows the keyword of a text chunk, if it is this one.
fn keyword<'a>(data: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    data.strip_prefix(word)?.strip_prefix(b"\0")
}

/// The text of an iTXt chunk behind its keyword: compression flag and method, language, translated keyword.
fn international(data: &[u8]) -> Option<Cow<'_, [u8]>> {
    let compressed = *data.first()? == 1;
    let text = data.get(2..)?.splitn(3, |&b| b == 0).nth(2)?;
    if compressed { inflate(text).map(Cow::from) } else { Some(text.into()) }
}

fn inflate(data: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    flate2::read::ZlibDecoder::new(data).take(MOST_TEXT).read_to_end(&mut text).ok()?;
    Some(text)
}

/// ImageMagick's profiles: an empty line, the name, the length, then hexadecimal digits.
fn hexadecimal(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.splitn(4, |&b| b == b'\n').nth(3)?;
    let digits: Vec<u8> = digits
        .iter()
        .filter(|b| !b.is_ascii_whitespace())
        .map(|&b| char::from(b).to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    Some(digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect())
}

fn webp_chunks<'a>(bytes: &'a [u8], found: &mut Found<'a>) {
    // Metadata exists in the extended format only, and counts if its header announces it.
    let Some(flags) = bytes.get(12..21).filter(|head| head.starts_with(b"VP8X")).map(|head| head[8]) else { return };
    let mut at = 12;
    while let Some((name, size)) = bytes.get(at..).and_then(|rest| rest.split_first_chunk::<4>()) {
        let Some(length) = size.first_chunk().map(|size| u32::from_le_bytes(*size) as usize) else { return };
        let Some(data) = size.get(4..).and_then(|rest| rest.get(..length)) else { return };
        match name {
            b"EXIF" if flags & 8 != 0 => found.exif = found.exif.take().or(Some(data.into())),
            b"XMP " if flags & 4 != 0 => found.xmp = found.xmp.take().or(Some(data.into())),
            _ => {}
        }
        at += 8 + length + length % 2;
    }
}

/// The tag in the first directory of a TIFF structure.
fn in_directory(exif: &[u8]) -> Option<u8> {
    let exif = exif.strip_prefix(PREFIX).unwrap_or(exif);
    let exif = exif.strip_prefix(PREFIX).unwrap_or(exif);
    let little = match exif.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let number = |at: usize, count: usize| {
        let bytes = exif.get(at..at.checked_add(count)?)?;
        let join = |n: usize, &b: &u8| n << 8 | usize::from(b);
        Some(if little { bytes.iter().rev().fold(0, join) } else { bytes.iter().fold(0, join) })
    };
    let directory = number(4, 4)?;
    let entry = |i: usize| directory.checked_add(2 + 12 * i);
    let entries =
        (0..number(directory, 2)?).map_while(entry).take_while(|&at| exif.len() >= 12 && at <= exif.len() - 12);
    // Pillow keeps the last of several.
    let at = entries.filter(|&at| number(at, 2) == Some(0x0112)).last()?;
    let size = match number(at + 2, 2)? {
        1 | 6 => 1,
        3 | 8 => 2,
        4 | 9 => 4,
        _ => return None,
    };
    if number(at + 4, 4)? != 1 {
        return None;
    }
    u8::try_from(number(at + 8, size)?).ok()
}

/// Pillow's `tiff:Orientation(="|>)([0-9])`.
pub fn in_xmp(xmp: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    xmp.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME).find_map(|(at, _)| {
        let rest = &xmp[at + NAME.len()..];
        let digit = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?.first()?;
        digit.is_ascii_digit().then(|| digit - b'0')
    })
}
