//! Images that need not be decoded again: in memory, or in one file that the next process finds.
//!
//! An entry belongs to a path, a size and a modification time. Each look-up compares them with the file as it is now, so
//! that a file that changed is decoded again, and one that is gone is an error as without a cache.

mod file;
mod map;
mod ram;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use self::file::LogFile;
use self::ram::Ram;
use crate::data::job::unpack;
use crate::data::memory::reserve;
use crate::error::{Error, Result};
use crate::image::{Image, Layout};

/// What tells two versions of a file apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
}

impl Stamp {
    /// # Errors
    /// When the file cannot be looked at.
    pub fn of(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.into(), source };
        let metadata = fs::metadata(path).map_err(io)?;
        let modified = metadata.modified().map_err(io)?;
        let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
        };
        Ok(Self { size: metadata.len(), modified: nanoseconds })
    }
}

/// An image as it is kept: packed rows of 1 or 3 bytes per pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    width: u32,
    height: u32,
    channels: u32,
}

impl Shape {
    fn of(image: &Image) -> Option<Self> {
        let number = |n: usize| u32::try_from(n).ok();
        let channels = number(image.layout.channels())?;
        Some(Self { width: number(image.width)?, height: number(image.height)?, channels })
    }

    /// `None` where the product is no length of anything.
    fn bytes(self) -> Option<usize> {
        let [width, height, channels] = [self.width, self.height, self.channels].map(|n| n as usize);
        width.checked_mul(height)?.checked_mul(channels)
    }

    /// Whether `data` was an image of this shape, which is in `image` now.
    fn restore(self, data: &[u8], image: &mut Image) -> bool {
        unpack(self.height as usize, self.width as usize, self.channels as usize, data, image).is_ok()
    }
}

/// What has happened to a cache so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub images: u64,
    pub bytes: u64,
    pub limit: u64,
    /// Images for which there was no room.
    pub refused: u64,
    /// Why nothing can be stored any more.
    pub trouble: Option<String>,
}

enum Store {
    Ram(Box<Ram>),
    File(LogFile),
}

pub struct Cache {
    store: Store,
    limit: u64,
    refused: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// What became of an image that was to be kept.
enum Outcome {
    Kept,
    NoRoom,
    /// Somebody else keeps it, or nobody may.
    Passed,
}

impl Cache {
    /// Keeps up to `limit` bytes.
    pub fn in_memory(limit: u64) -> Self {
        Self::new(Store::Ram(Box::default()), limit)
    }

    /// Keeps images in the file `path`, up to `limit` bytes. `key` names everything that shaped them besides their own
    /// files: a file with another key, or one that is damaged, is replaced.
    ///
    /// # Errors
    /// When the file can be neither opened nor made.
    pub fn in_file(path: &Path, key: &[u8], limit: u64) -> Result<Self> {
        Ok(Self::new(Store::File(LogFile::open(path, key)?), limit))
    }

    fn new(store: Store, limit: u64) -> Self {
        Self { store, limit, refused: AtomicU64::new(0), trouble: Mutex::default() }
    }

    /// Whether there was an image of exactly this file, which is in `image` now.
    pub fn get(&self, path: &Path, stamp: Stamp, image: &mut Image) -> bool {
        match &self.store {
            Store::Ram(ram) => ram.get(path, stamp, image),
            Store::File(file) => file.get(path, stamp, image),
        }
    }

    /// Keeps an image if there is room. Nothing that goes wrong here is worth an error: the image is there.
    pub fn put(&self, path: &Path, stamp: Stamp, image: &Image) {
        let Some(shape) = Shape::of(image) else { return };
        let outcome = match &self.store {
            Store::Ram(ram) => Ok(ram.put(path, stamp, shape, image, self.limit)),
            Store::File(file) => file.put(path, stamp, shape, image, self.limit),
        };
        match outcome {
            Ok(Outcome::NoRoom) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Outcome::Kept | Outcome::Passed) => {}
            Err(error) => {
                let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                trouble.get_or_insert_with(|| error.to_string());
            }
        }
    }

    /// Takes in what other processes have added to the file.
    pub fn refresh(&self) {
        if let Store::File(file) = &self.store {
            file.refresh();
        }
    }

    pub fn status(&self) -> Status {
        let (images, bytes) = match &self.store {
            Store::Ram(ram) => ram.size(),
            Store::File(file) => file.size(),
        };
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status { images, bytes, limit: self.limit, refused: self.refused.load(Ordering::Relaxed), trouble }
    }
}

/// Rows without the fourth byte of their pixels.
pub(super) fn pack(image: &Image, out: &mut Vec<u8>) -> Result<()> {
    match image.layout {
        Layout::Gray => {
            reserve(out, image.data.len())?;
            out.extend_from_slice(&image.data);
        }
        Layout::Rgbx => {
            let pixels = image.data.as_chunks::<4>().0;
            let start = out.len();
            reserve(out, 3 * pixels.len())?;
            out.resize(start + 3 * pixels.len(), 0);
            let triples = out.get_mut(start..).unwrap_or_default().as_chunks_mut::<3>().0;
            for (triple, &[r, g, b, _]) in triples.iter_mut().zip(pixels) {
                *triple = [r, g, b];
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
