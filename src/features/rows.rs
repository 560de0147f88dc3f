//! Rows on disk: a `.npy` file that is filled in any order, and a journal of the rows that are safely in it.
//!
//! A commit is: rows written, file flushed, then one record appended to the journal and flushed. Whatever is killed
//! between these leaves rows that no record names, and they are computed again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::npy::{HEADER, header};
use super::{Place, journal};
use crate::engine::Dtype;
use crate::error::{Error, Result};
use crate::os::{self, FileExt};

/// Which file, and how it is written.
#[derive(Debug, Clone)]
pub struct Target {
    pub path: PathBuf,
    /// Where the commit records go; without it nothing can be resumed.
    pub journal: Option<PathBuf>,
    /// Rows in the finished file, where that is known before.
    pub total: Option<u64>,
    /// Whether the file may be there, with the rows that the journal names.
    pub resume: bool,
}

/// Rows of another file that are copied: (first row there, first row here, rows), and the identities of these rows.
#[derive(Debug, Clone)]
pub struct Move {
    pub from: u64,
    pub to: u64,
    pub count: u64,
    pub ids: Vec<String>,
}

pub struct RowFile {
    target: Target,
    file: File,
    journal: Option<File>,
    row: Vec<usize>,
    dtype: Dtype,
    row_bytes: u64,
    /// Behind the last row that was appended without a place.
    end: u64,
    records: String,
    unsynced: usize,
}

/// How much is copied before a commit.
const COMMIT: usize = 64 << 20;

impl RowFile {
    /// Makes the file, or opens it to go on.
    ///
    /// # Errors
    /// `Io`, a full disk included: the whole file is reserved at once where its size is known. `Argument` when the rows
    /// that are there have another shape.
    pub fn open(target: Target, row: &[usize], dtype: Dtype) -> Result<Self> {
        let row_bytes = (row.iter().product::<usize>() * dtype.bytes()) as u64;
        let head = header(dtype, target.total.unwrap_or(0), row);
        let io = |source| Error::Io { path: target.path.clone(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(!target.resume);
        let file = options.open(&target.path).map_err(io)?;
        // Of several processes that begin at the same time each writes the same header.
        if file.metadata().map_err(io)?.len() >= HEADER {
            let mut found = vec![0; head.len()];
            file.read_exact_at(&mut found, 0).map_err(io)?;
            if found != head {
                return Err(Error::Argument(format!(
                    "{}: the features now have shape {row:?} ({dtype:?}) per image, those that are stored do not: \
                     delete the folder to start again",
                    target.path.display()
                )));
            }
        } else {
            file.write_all_at(&head, 0).map_err(io)?;
        }
        if let Some(total) = target.total {
            os::reserve(&file, HEADER + total * row_bytes).map_err(io)?;
        }
        let journal = target.journal.as_ref().map(|path| {
            let opened = OpenOptions::new().append(true).open(path);
            opened.map_err(|source| Error::Io { path: path.clone(), source })
        });
        let journal = journal.transpose()?;
        let row = row.to_vec();
        Ok(Self { target, file, journal, row, dtype, row_bytes, end: 0, records: String::new(), unsynced: 0 })
    }

    /// Writes rows; they count from the next [`RowFile::commit`] on.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&mut self, bytes: &[u8], place: Place) -> Result<()> {
        let next = [(self.end, (bytes.len() as u64).checked_div(self.row_bytes).unwrap_or_default())];
        let runs = if place.runs.is_empty() { &next[..] } else { &place.runs };
        let mut named = Vec::with_capacity(runs.len());
        let mut rest = bytes;
        for &(start, count) in runs {
            let (now, later) = rest.split_at(rest.len().min((count * self.row_bytes) as usize));
            self.at(self.file.write_all_at(now, HEADER + start * self.row_bytes))?;
            named.push((start, count, crc32fast::hash(now)));
            self.end = self.end.max(start + count);
            rest = later;
        }
        self.unsynced += bytes.len();
        if self.journal.is_some() {
            self.records.push_str(&journal::record(named, place.ids));
        }
        Ok(())
    }

    /// Makes all rows written so far count.
    ///
    /// # Errors
    /// `Io`.
    pub fn commit(&mut self) -> Result<()> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        if self.records.is_empty() {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| Error::Io { path: self.target.path.clone(), source })?;
        let path = self.target.journal.clone().unwrap_or_default();
        let written = journal.write_all(self.records.as_bytes()).and_then(|()| journal.sync_data());
        written.map_err(|source| Error::Io { path, source })?;
        self.records.clear();
        self.unsynced = 0;
        Ok(())
    }

    /// Copies rows of a file with the same kind of rows, committing as it goes.
    ///
    /// # Errors
    /// `Io`.
    pub fn copy(&mut self, source: &Path, moves: Vec<Move>) -> Result<()> {
        let io = |error| Error::Io { path: source.to_owned(), source: error };
        let file = File::open(source).map_err(io)?;
        let mut buffer = Vec::new();
        for one in moves {
            buffer.resize((one.count * self.row_bytes) as usize, 0);
            file.read_exact_at(&mut buffer, HEADER + one.from * self.row_bytes).map_err(io)?;
            self.write(&buffer, Place { runs: vec![(one.to, one.count)], ids: one.ids })?;
            if self.unsynced >= COMMIT {
                self.commit()?;
            }
        }
        self.commit()
    }

    /// Completes the file, which keeps its name; returns the shape.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(mut self) -> Result<Vec<usize>> {
        self.commit()?;
        let total = self.target.total.unwrap_or(self.end);
        if self.target.total.is_none() {
            self.at(self.file.write_all_at(&header(self.dtype, total, &self.row), 0))?;
        }
        self.at(self.file.sync_all())?;
        let mut shape = vec![usize::try_from(total).unwrap_or(usize::MAX)];
        shape.extend(&self.row);
        Ok(shape)
    }

    fn at<T>(&self, result: io::Result<T>) -> Result<T> {
        result.map_err(|source| Error::Io { path: self.target.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(folder: &Path, total: Option<u64>) -> Target {
        let journal = folder.join("journal");
        std::fs::write(&journal, "").unwrap();
        Target { path: folder.join("features.npy"), journal: Some(journal), total, resume: false }
    }

    #[test]
    fn rows_land_in_their_places_and_are_recorded_at_the_commit() {
        let folder = tempfile::tempdir().unwrap();
        let target = target(folder.path(), Some(4));
        let journal = target.journal.clone().unwrap();
        let mut file = RowFile::open(target.clone(), &[2], Dtype::Float16).unwrap();
        file.write(b"ccccaaaa", Place { runs: vec![(2, 1), (0, 1)], ids: vec!["x".into(), "y".into()] }).unwrap();
        assert_eq!(std::fs::read_to_string(&journal).unwrap(), "");
        file.commit().unwrap();
        let (c, a) = (crc32fast::hash(b"cccc"), crc32fast::hash(b"aaaa"));
        let record = format!("{{\"rows\":[[2,1,{c}],[0,1,{a}]],\"ids\":[\"x\",\"y\"]}}");
        let line = format!("{:08x} {record}\n", crc32fast::hash(record.as_bytes()));
        assert_eq!(std::fs::read_to_string(&journal).unwrap(), line);
        drop(file);

        let again = Target { resume: true, ..target };
        assert!(RowFile::open(again.clone(), &[3], Dtype::Float16).is_err());
        let mut file = RowFile::open(again, &[2], Dtype::Float16).unwrap();
        file.write(b"bbbb", Place { runs: vec![(1, 1)], ids: vec![] }).unwrap();
        assert_eq!(file.finish().unwrap(), [4, 2]);
        let bytes = std::fs::read(folder.path().join("features.npy")).unwrap();
        assert_eq!(&bytes[HEADER as usize..], b"aaaabbbbcccc\0\0\0\0");
    }

    #[test]
    fn an_unknown_number_of_rows_is_filled_in_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let target = Target { journal: None, ..target(folder.path(), None) };
        let mut file = RowFile::open(target, &[2], Dtype::Float32).unwrap();
        file.write(&[1; 16], Place::default()).unwrap();
        file.write(&[2; 8], Place::default()).unwrap();
        assert_eq!(file.finish().unwrap(), [3, 2]);
        assert_eq!(std::fs::metadata(folder.path().join("features.npy")).unwrap().len(), HEADER + 24);
    }

    #[test]
    fn rows_are_copied_from_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let source = Target { journal: None, path: folder.path().join("old"), ..target(folder.path(), None) };
        let mut old = RowFile::open(source.clone(), &[], Dtype::Float32).unwrap();
        old.write(b"aaaabbbbcccc", Place::default()).unwrap();
        old.finish().unwrap();
        let mut file = RowFile::open(target(folder.path(), Some(3)), &[], Dtype::Float32).unwrap();
        let moves = [(1, 0, 2), (0, 2, 1)].map(|(from, to, count)| Move { from, to, count, ids: vec![] });
        file.copy(&source.path, moves.into()).unwrap();
        file.finish().unwrap();
        let bytes = std::fs::read(folder.path().join("features.npy")).unwrap();
        assert_eq!(&bytes[HEADER as usize..], b"bbbbccccaaaa");
    }
}
