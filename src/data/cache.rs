//! Images that need not be decoded again: in memory, or in one file that the next process finds.
//!
//! An entry belongs to a path, a size and a modification time. Each look-up compares them with the file as it is now, so
//! that a file that changed is decoded again, and one that is gone is an error as without a cache.

mod entry;
mod file;
mod map;
mod ram;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

pub use self::entry::Stamp;
use self::entry::{Outcome, PackedShape};
use self::file::LogFile;
use self::ram::Ram;
use crate::error::Result;
use crate::image::Image;

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
        let Some(shape) = PackedShape::of(image) else { return };
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

#[cfg(test)]
mod tests;
