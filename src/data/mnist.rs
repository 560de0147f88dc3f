//! IDX, the format of the MNIST files: a magic number, big-endian dimensions, bytes. Raw or gzipped.

use std::io::{self, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::data::open;
use crate::error::{DecodeKind, Error, Result};
use crate::memory::copied;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `(count, height, width)`
    Images,
    /// `(count,)`
    Labels,
}

impl Kind {
    /// Two zero bytes, the code of `u8`, the number of dimensions.
    const fn magic(self) -> u32 {
        match self {
            Self::Images => 0x0803,
            Self::Labels => 0x0801,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Labels => "labels",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Idx {
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Decode`] when it is not a complete IDX file of this kind.
pub fn read(path: &Path, kind: Kind) -> Result<Idx> {
    let io = |source| Error::Io { path: path.into(), source };
    let mut bytes = Vec::new();
    let (mut file, _) = open::regular(path)?;
    file.read_to_end(&mut bytes).map_err(io)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut raw = Vec::new();
        MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut raw).map_err(|error| {
            let reason = match error.kind() {
                io::ErrorKind::OutOfMemory => return io(error),
                io::ErrorKind::UnexpectedEof => "the gzip data ends early: the download is incomplete".to_owned(),
                _ => format!("the gzip data is damaged: {error}"),
            };
            Error::decode(reason).at(path)
        })?;
        bytes = raw;
    }
    parse(&bytes, kind).map_err(|error| error.at(path))
}

/// # Errors
/// [`Error::Decode`] when `bytes` are not exactly one IDX array of this kind.
pub fn parse(bytes: &[u8], kind: Kind) -> Result<Idx> {
    let mut words = bytes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let dimensions = (kind.magic() & 0xff) as usize;
    let magic = words.next().ok_or_else(|| Error::decode("not an IDX file: shorter than its magic number"))?;
    if magic != kind.magic() {
        let reason = format!(
            "not an IDX file of {}: it starts with {magic:#010x}, expected {:#010x}",
            kind.name(),
            kind.magic()
        );
        return Err(Error::undecodable(DecodeKind::Unknown, reason));
    }
    let shape: Vec<usize> = words.take(dimensions).map(|n| n as usize).collect();
    let header = 4 * (1 + dimensions);
    let expected = shape.iter().try_fold(1_usize, |size, &n| size.checked_mul(n));
    let (true, Some(expected)) = (shape.len() == dimensions, expected) else {
        return Err(Error::decode("the IDX header is incomplete or its sizes make no sense"));
    };
    let data = bytes.get(header..).unwrap_or_default();
    if data.len() != expected {
        let fault = if data.len() < expected { "the file is cut short" } else { "there is something behind the data" };
        let reason = format!("the IDX header promises {expected} bytes {shape:?}, {} follow: {fault}", data.len());
        return Err(Error::decode(reason));
    }
    Ok(Idx { shape, data: copied(data)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;
    use std::io::Write;

    fn idx(magic: u32, shape: &[u32], data: &[u8]) -> Vec<u8> {
        let words = std::iter::once(magic).chain(shape.iter().copied());
        words.flat_map(u32::to_be_bytes).chain(data.iter().copied()).collect()
    }

    #[test]
    fn raw_and_gzipped_files_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = idx(0x0803, &[2, 3, 2], &(0..12).collect::<Vec<u8>>());
        let raw = folder.path().join("raw");
        std::fs::write(&raw, &bytes).unwrap();
        let zipped = folder.path().join("zipped");
        let mut gz = flate2::write::GzEncoder::new(File::create(&zipped).unwrap(), flate2::Compression::fast());
        gz.write_all(&bytes).unwrap();
        gz.finish().unwrap();
        let expected = Idx { shape: vec![2, 3, 2], data: (0..12).collect() };
        assert_eq!(read(&raw, Kind::Images).unwrap(), expected);
        assert_eq!(read(&zipped, Kind::Images).unwrap(), expected);

        let whole = std::fs::read(&zipped).unwrap();
        std::fs::write(&zipped, &whole[..whole.len() - 9]).unwrap();
        let error = read(&zipped, Kind::Images).unwrap_err().to_string();
        assert!(error.contains("incomplete") && error.contains("zipped"), "{error}");
    }

    #[test]
    fn every_fault_is_named() {
        let cases: [(&[u8], &str); 5] = [
            (b"", "shorter"),
            (&idx(0x0801, &[2], &[1, 2]), "starts with 0x00000801, expected 0x00000803"),
            (&idx(0x0803, &[2, 2], &[]), "header is incomplete"),
            (&idx(0x0803, &[2, 2, 2], &[0; 7]), "cut short"),
            (&idx(0x0803, &[2, 2, 2], &[0; 9]), "behind the data"),
        ];
        for (bytes, reason) in cases {
            let error = parse(bytes, Kind::Images).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let huge = idx(0x0803, &[u32::MAX, u32::MAX, u32::MAX], &[]);
        assert!(parse(&huge, Kind::Images).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_array_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            for kind in [Kind::Images, Kind::Labels] {
                if let Ok(idx) = parse(&bytes, kind) {
                    prop_assert_eq!(idx.data.len(), idx.shape.iter().product::<usize>());
                }
            }
        }
    }
}
