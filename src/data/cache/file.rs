//! Images in one file: a log that processes append to, each record with a check sum.
//!
//! ```text
//! magic | committed end | length of the key | key | record | record | ... | (what a process that died left behind)
//! record: tag, lengths, shape, stamp of the image file, CRC-32 | path | pixels
//! ```
//! Whoever appends holds the file's lock, writes behind the committed end and then moves that end: a process that dies
//! in between leaves bytes that the next one overwrites. A later record of a path replaces an earlier one.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};

use crc32fast::Hasher;
use memmap2::Mmap;

use super::entry::{Outcome, PackedShape, Stamp};
use super::map::map;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::os::{self, FileExt};

const MAGIC: &[u8; 16] = b"cnnrs cache v1\n\0";
/// The committed end follows the magic, the length of the key follows that.
const END_AT: u64 = 16;
const KEY_AT: usize = 32;
const TAG: u32 = u32::from_le_bytes(*b"IMG1");
const HEAD: usize = 40;

#[derive(Clone)]
struct Record {
    offset: u64,
    path_length: usize,
    shape: PackedShape,
    stamp: Stamp,
    // Sums are checked when a process reads a record for the first time.
    checked: Arc<AtomicBool>,
}

#[derive(Default)]
struct Index {
    entries: HashMap<PathBuf, Record>,
    /// Where the records end that `entries` knows.
    end: u64,
}

pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    index: RwLock<Index>,
    mapped: RwLock<Option<Arc<Mmap>>>,
    // The file's lock keeps other processes out, this one other threads.
    appending: Mutex<Vec<u8>>,
    pid: u32,
}

impl LogFile {
    pub(super) fn open(path: &Path, key: &[u8]) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
        }
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => begin(path, key).map_err(io)?,
            Err(error) => return Err(io(error)),
        };
        let file = if has_key(&file, key) { file } else { begin(path, key).map_err(io)? };
        let opened = Self::of(path, file, key);
        if opened.update() {
            return Ok(opened);
        }
        Ok(Self::of(path, begin(path, key).map_err(io)?, key))
    }

    fn of(path: &Path, file: File, key: &[u8]) -> Self {
        let index = Index { end: (KEY_AT + key.len()) as u64, ..Index::default() };
        let (index, mapped) = (RwLock::new(index), RwLock::default());
        Self { path: path.into(), file, index, mapped, appending: Mutex::default(), pid: std::process::id() }
    }

    pub(super) fn get(&self, path: &Path, stamp: Stamp, image: &mut Image) -> bool {
        self.find(path, stamp).is_some_and(|entry| self.restore(path, &entry, image))
    }

    fn find(&self, path: &Path, stamp: Stamp) -> Option<Record> {
        let path = std::path::absolute(path).ok()?;
        // As in `ram`: nobody waits in a forked child.
        let index = if self.pid == std::process::id() {
            self.index.read().unwrap_or_else(PoisonError::into_inner)
        } else {
            self.index.try_read().ok()?
        };
        index.entries.get(&path).filter(|entry| entry.stamp == stamp).cloned()
    }

    fn restore(&self, path: &Path, entry: &Record, image: &mut Image) -> bool {
        let Some(length) = entry.shape.bytes() else { return false };
        let start = entry.offset as usize;
        let end = start + HEAD + entry.path_length + length;
        let Some(mapped) = self.map_to(end) else { return false };
        let Some(record) = mapped.get(start..end) else { return false };
        if !entry.checked.load(Ordering::Relaxed) {
            if !is_whole(record) {
                self.forget(path);
                return false;
            }
            entry.checked.store(true, Ordering::Relaxed);
        }
        record.get(HEAD + entry.path_length..).is_some_and(|pixels| entry.shape.restore(pixels, image))
    }

    fn forget(&self, path: &Path) {
        let Ok(path) = std::path::absolute(path) else { return };
        if self.pid == std::process::id() {
            self.index.write().unwrap_or_else(PoisonError::into_inner).entries.remove(&path);
        }
    }

    /// The file as bytes, at least up to `end`.
    fn map_to(&self, end: usize) -> Option<Arc<Mmap>> {
        let long_enough = |mapped: &Option<Arc<Mmap>>| mapped.clone().filter(|mapped| mapped.len() >= end);
        match self.mapped.try_read() {
            Ok(mapped) => {
                if let Some(found) = long_enough(&mapped) {
                    return Some(found);
                }
            }
            Err(TryLockError::WouldBlock) if self.pid != std::process::id() => return None,
            Err(_) => {}
        }
        let mut mapped = self.mapped.write().unwrap_or_else(PoisonError::into_inner);
        if long_enough(&mapped).is_none() {
            *mapped = map(&self.file).ok().map(Arc::new);
        }
        long_enough(&mapped)
    }

    /// Appends the image, unless another process has done so meanwhile.
    pub(super) fn put(
        &self,
        path: &Path,
        stamp: Stamp,
        shape: PackedShape,
        image: &Image,
        limit: u64,
    ) -> Result<Outcome> {
        if self.pid != std::process::id() {
            // A forked child shares the parent's lock with it: the two would write over each other.
            return Ok(Outcome::Passed);
        }
        let io = |source| Error::Io { path: self.path.clone(), source };
        let name = std::path::absolute(path).map_err(io)?;
        let mut record = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        write_record(&name, stamp, shape, image, &mut record)?;
        self.file.lock().map_err(io)?;
        let outcome = self.append(&name, stamp, shape, &record, limit);
        self.file.unlock().map_err(io)?;
        outcome.map_err(io)
    }

    fn append(&self, name: &Path, stamp: Stamp, shape: PackedShape, record: &[u8], limit: u64) -> io::Result<Outcome> {
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "the cache is damaged: delete the file");
        if !self.update() {
            return Err(broken());
        }
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if index.entries.get(name).is_some_and(|entry| entry.stamp == stamp) {
            return Ok(Outcome::Passed);
        }
        let (offset, end) = (index.end, index.end + record.len() as u64);
        if end > limit {
            return Ok(Outcome::NoRoom);
        }
        self.file.write_all_at(record, offset)?;
        self.file.write_all_at(&end.to_le_bytes(), END_AT)?;
        let (path_length, checked) = (name.as_os_str().len(), Arc::new(AtomicBool::new(true)));
        index.entries.insert(name.into(), Record { offset, path_length, shape, stamp, checked });
        index.end = end;
        Ok(Outcome::Kept)
    }

    pub(super) fn refresh(&self) {
        self.update();
    }

    /// Reads the records that were committed since; false when they make no sense.
    fn update(&self) -> bool {
        let Some(end) = number(&self.file, END_AT) else { return false };
        let known = self.index.read().unwrap_or_else(PoisonError::into_inner).end;
        if end <= known {
            return end == known;
        }
        let Some(mapped) = usize::try_from(end).ok().and_then(|end| self.map_to(end)) else { return false };
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        while index.end < end {
            let Some((path, entry)) = mapped.get(index.end as usize..end as usize).and_then(read_head) else {
                return false;
            };
            let entry = Record { offset: index.end, ..entry };
            index.end += (HEAD + entry.path_length + entry.shape.bytes().unwrap_or_default()) as u64;
            index.entries.insert(path, entry);
        }
        index.end == end
    }

    pub(super) fn size(&self) -> (u64, u64) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        (index.entries.len() as u64, index.end)
    }
}

/// A new file without records. It gets its name when it is complete, in place of what had it.
fn begin(path: &Path, key: &[u8]) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&name)?;
    let end = (KEY_AT + key.len()) as u64;
    let parts = [MAGIC.as_slice(), &end.to_le_bytes(), &(key.len() as u64).to_le_bytes(), key];
    file.write_all_at(&parts.concat(), 0)?;
    // The second of two processes that begin at once goes on with the file of the first: `hard_link` refuses, a plain
    // rename would pull the file away under it. A file with another key or a damaged one is replaced.
    match fs::hard_link(&name, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = OpenOptions::new().read(true).write(true).open(path)?;
            if has_key(&there, key) && LogFile::of(path, there.try_clone()?, key).update() {
                fs::remove_file(&name)?;
                return Ok(there);
            }
            fs::rename(&name, path)?;
        }
        // No links here (FAT, some network folders).
        Err(_) => fs::rename(&name, path)?,
        Ok(()) => fs::remove_file(&name)?,
    }
    Ok(file)
}

fn has_key(file: &File, key: &[u8]) -> bool {
    let mut head = vec![0; KEY_AT + key.len()];
    file.read_exact_at(&mut head, 0).is_ok()
        && head.starts_with(MAGIC)
        && head.get(24..KEY_AT) == Some(&(key.len() as u64).to_le_bytes())
        && head.ends_with(key)
}

fn number(file: &File, offset: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(u64::from_le_bytes(bytes))
}

fn write_record(path: &Path, stamp: Stamp, shape: PackedShape, image: &Image, record: &mut Vec<u8>) -> Result<()> {
    let name = path.as_os_str().as_encoded_bytes();
    record.clear();
    for word in [TAG, u32::try_from(name.len()).unwrap_or(u32::MAX), shape.width, shape.height, shape.channels, 0] {
        record.extend_from_slice(&word.to_le_bytes());
    }
    record.extend_from_slice(&stamp.size.to_le_bytes());
    record.extend_from_slice(&stamp.modified.to_le_bytes());
    record.extend_from_slice(name);
    image.pack(record)?;
    let sum = sum(record);
    if let Some(place) = record.get_mut(20..24) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
    Ok(())
}

/// The first record of `bytes`; its offset is not known here.
fn read_head(bytes: &[u8]) -> Option<(PathBuf, Record)> {
    let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..at + 4)?.first_chunk()?));
    let double = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..at + 8)?.first_chunk()?));
    if word(0)? != TAG {
        return None;
    }
    let path_length = word(4)? as usize;
    let shape = PackedShape { width: word(8)?, height: word(12)?, channels: word(16)? };
    let stamp = Stamp { size: double(24)?, modified: double(32)?.cast_signed() };
    let path = PathBuf::from(&os::name(bytes.get(HEAD..HEAD.checked_add(path_length)?)?));
    let length = HEAD.checked_add(path_length)?.checked_add(shape.bytes()?)?;
    let checked = Arc::new(AtomicBool::new(false));
    (length <= bytes.len()).then_some((path, Record { offset: 0, path_length, shape, stamp, checked }))
}

/// CRC-32 of a record, its own place left out.
fn sum(record: &[u8]) -> u32 {
    let mut crc = Hasher::new();
    crc.update(record.get(..20).unwrap_or_default());
    crc.update(record.get(24..).unwrap_or_default());
    crc.finalize()
}

fn is_whole(record: &[u8]) -> bool {
    record.get(20..24) == Some(&sum(record).to_le_bytes())
}
