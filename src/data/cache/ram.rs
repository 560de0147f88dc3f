//! Images in memory.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::entry::{Outcome, PackedShape, Stamp};
use crate::image::Image;

/// What an entry costs besides its pixels and its path: the map's share, two allocations.
const ENTRY: u64 = 160;
const SHARDS: usize = 16;

struct Held {
    stamp: Stamp,
    shape: PackedShape,
    data: Arc<Vec<u8>>,
}

pub(super) struct Ram {
    // Several maps: threads that store do not wait for those that read.
    shards: [RwLock<HashMap<PathBuf, Held>>; SHARDS],
    hasher: RandomState,
    images: AtomicU64,
    bytes: AtomicU64,
    pid: u32,
}

impl Default for Ram {
    fn default() -> Self {
        let (images, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { shards: Default::default(), hasher: RandomState::new(), images, bytes, pid: std::process::id() }
    }
}

impl Ram {
    /// In a forked child the thread that held a lock may not exist any more: nobody waits for it there.
    fn may_wait(&self) -> bool {
        self.pid == std::process::id()
    }

    fn shard(&self, path: &Path) -> Option<&RwLock<HashMap<PathBuf, Held>>> {
        self.shards.get(self.hasher.hash_one(path) as usize % SHARDS)
    }

    pub(super) fn get(&self, path: &Path, stamp: Stamp, image: &mut Image) -> bool {
        let found = self.shard(path).and_then(|shard| {
            let wait = || shard.read().unwrap_or_else(PoisonError::into_inner);
            let entries = if self.may_wait() { wait() } else { shard.try_read().ok()? };
            entries.get(path).filter(|entry| entry.stamp == stamp).map(|entry| (entry.shape, Arc::clone(&entry.data)))
        });
        found.is_some_and(|(shape, data)| shape.restore(&data, image))
    }

    pub(super) fn put(&self, path: &Path, stamp: Stamp, shape: PackedShape, image: &Image, limit: u64) -> Outcome {
        let cost = |length: usize| (length + path.as_os_str().len()) as u64 + ENTRY;
        let Some(size) = shape.bytes().map(cost) else { return Outcome::Passed };
        // First the claim, then the memory: threads together stay below the limit.
        if self.bytes.fetch_add(size, Ordering::Relaxed) + size > limit {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            return Outcome::NoRoom;
        }
        let mut data = Vec::new();
        if image.pack(&mut data).is_err() {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            return Outcome::NoRoom;
        }
        let entry = Held { stamp, shape, data: Arc::new(data) };
        let entries = self.shard(path).and_then(|shard| {
            let wait = || shard.write().unwrap_or_else(PoisonError::into_inner);
            if self.may_wait() { Some(wait()) } else { shard.try_write().ok() }
        });
        let Some(mut entries) = entries else {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            return Outcome::Passed;
        };
        match entries.insert(path.to_path_buf(), entry) {
            Some(old) => self.bytes.fetch_sub(cost(old.data.len()), Ordering::Relaxed),
            None => self.images.fetch_add(1, Ordering::Relaxed),
        };
        Outcome::Kept
    }

    pub(super) fn size(&self) -> (u64, u64) {
        (self.images.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}
