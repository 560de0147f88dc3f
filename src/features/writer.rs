//! Writes rows in a thread of its own, while the next batch is computed.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Place, RowFile, Sink, Target};
use crate::engine::{Dtype, Rows};
use crate::error::{Error, Result};

type Job = (Box<dyn Rows + Send>, Place);

/// Batches that may wait for the disk: they bound the memory.
const WAITING: usize = 3;

/// A [`RowFile`] behind a thread. Dropping it keeps what has arrived.
pub struct Writer {
    target: Target,
    running: Option<(SyncSender<Job>, JoinHandle<Result<RowFile>>)>,
}

impl Writer {
    pub fn new(target: Target) -> Self {
        Self { target, running: None }
    }

    /// Waits until everything is on disk; returns the shape.
    ///
    /// # Errors
    /// What went wrong in the thread; `Argument` when there were no rows.
    pub fn finish(mut self) -> Result<Vec<usize>> {
        match self.running.take() {
            Some(running) => join(running)?.finish(),
            None => Err(Error::Argument("no samples: there are no features to store".to_owned())),
        }
    }
}

impl Sink for Writer {
    fn begin(&mut self, row: &[usize], dtype: Dtype) -> Result<()> {
        let file = RowFile::open(self.target.clone(), row, dtype)?;
        let (sender, receiver) = sync_channel(WAITING);
        let thread = std::thread::Builder::new().name("cnnrs-store".to_owned());
        let thread = thread.spawn(move || run(file, &receiver));
        let thread = thread.map_err(|e| Error::Threads(format!("cannot start the thread that writes: {e}")))?;
        self.running = Some((sender, thread));
        Ok(())
    }

    fn append(&mut self, rows: Box<dyn Rows + Send>, place: Place) -> Result<()> {
        let Some((sender, thread)) = self.running.take() else {
            return Err(Error::internal("append() before begin()"));
        };
        match sender.send((rows, place)) {
            Ok(()) => {
                self.running = Some((sender, thread));
                Ok(())
            }
            // The thread has ended, so it has an error.
            Err(_) => join((sender, thread)).map(drop),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            // Whatever stopped the extraction is the error to report.
            let _ = join(running);
        }
    }
}

fn join((sender, thread): (SyncSender<Job>, JoinHandle<Result<RowFile>>)) -> Result<RowFile> {
    drop(sender);
    thread.join().unwrap_or_else(|_| Err(Error::Panic("the thread that writes features panicked".to_owned())))
}

fn run(mut file: RowFile, jobs: &Receiver<Job>) -> Result<RowFile> {
    while let Ok((rows, place)) = jobs.recv() {
        file.write(rows.bytes(), place)?;
        // One flush for everything that has arrived during the last one.
        while !file.is_due() {
            let Ok((rows, place)) = jobs.try_recv() else { break };
            file.write(rows.bytes(), place)?;
        }
        file.commit()?;
    }
    Ok(file)
}
