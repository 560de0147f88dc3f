//! Rows on disk, as a `.npy` file any NumPy opens (format: NEP 1).

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::Sink;
use crate::engine::Dtype;
use crate::error::{Error, Result};

/// Room for the header, so that the number of rows can be filled in when it is known.
const HEADER: usize = 256;

/// A `.npy` file that grows by rows. It has its final name only once [`NpyFile::finish`] has been called.
pub struct NpyFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    row: Vec<usize>,
    dtype: Option<Dtype>,
    bytes: u64,
}

impl NpyFile {
    /// # Errors
    /// `Io` when the file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let partial = path.with_extension("npy.partial");
        let file = File::create(&partial).map_err(|source| Error::Io { path: partial.clone(), source })?;
        Ok(Self { path: path.to_owned(), partial, file, row: Vec::new(), dtype: None, bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| Error::Io { path: self.partial.clone(), source })
    }

    /// Writes the header, flushes to disk and gives the file its name; returns the shape.
    ///
    /// # Errors
    /// `Io`; `Argument` when nothing was written.
    pub fn finish(mut self) -> Result<Vec<usize>> {
        let dtype =
            self.dtype.ok_or_else(|| Error::Argument("no samples: there are no features to store".to_owned()))?;
        let row_bytes = (self.row.iter().product::<usize>() * dtype.bytes()).max(1);
        let mut shape = vec![usize::try_from(self.bytes).unwrap_or(usize::MAX) / row_bytes];
        shape.extend(&self.row);
        let header = header(dtype, &shape);
        let io = |source| Error::Io { path: self.partial.clone(), source };
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(&header).map_err(io)?;
        self.file.sync_all().map_err(io)?;
        std::fs::rename(&self.partial, &self.path).map_err(|source| Error::Io { path: self.path.clone(), source })?;
        Ok(shape)
    }
}

impl Sink for NpyFile {
    fn begin(&mut self, row: &[usize], dtype: Dtype) -> Result<()> {
        self.row = row.to_vec();
        self.dtype = Some(dtype);
        self.write(&[0; HEADER])
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

fn header(dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if sizes.len() == 1 { "," } else { "" };
    let text =
        format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{comma}), }}", dtype.descr(), sizes.join(", "));
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend(((HEADER - 10) as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header.resize(HEADER - 1, b' ');
    header.push(b'\n');
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_256_bytes_and_ends_in_a_newline() {
        let header = header(Dtype::Float32, &[10, 512, 7, 7]);
        assert_eq!(header.len(), HEADER);
        assert!(header.starts_with(
            b"\x93NUMPY\x01\x00\xf6\x00{'descr': '<f4', 'fortran_order': False, 'shape': (10, 512, 7, 7), }"
        ));
        assert_eq!(header.last(), Some(&b'\n'));
    }

    #[test]
    fn an_unfinished_file_does_not_have_the_final_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("features.npy");
        let mut file = NpyFile::create(&path).unwrap();
        file.begin(&[2], Dtype::Float32).unwrap();
        file.append(&[0; 16]).unwrap();
        assert!(!path.exists());
        assert_eq!(file.finish().unwrap(), [2, 2]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 256 + 16);
    }
}
