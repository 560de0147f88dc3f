//! What outlives a batch: buffers and scratch space.

use std::sync::{Arc, Mutex, PoisonError};

use crate::data::batch::Buffers;
use crate::image::{Image, Scratch};

/// What a thread needs for itself; recycled, because its pages are expensive to get.
#[derive(Default)]
pub struct Worker {
    pub(super) file: Vec<u8>,
    pub(super) image: Image,
    pub(super) scratch: Scratch,
}

/// What survives an epoch: buffers and the threads' scratch space.
pub struct Memory {
    pub(super) buffers: Arc<Buffers>,
    pub(super) loose: Arc<Buffers>,
    workers: Mutex<Vec<Worker>>,
}

impl Memory {
    /// Keeps up to `batches` batch buffers for re-use.
    pub fn new(batches: usize) -> Arc<Self> {
        Arc::new(Self { buffers: Buffers::new(batches), loose: Buffers::new(0), workers: Mutex::default() })
    }

    pub(super) fn worker(&self) -> Worker {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub(super) fn give_back(&self, worker: Worker) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
    }
}
