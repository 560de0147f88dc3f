//! Writes rows in a thread of its own, while the next batches are computed.

use std::ops::RangeInclusive;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Place, RowFile, Sink, Target};
use crate::engine::{Dtype, Rows};
use crate::error::{Error, Result};

type Job = (Box<dyn Rows + Send>, Place);

/// Bytes of rows that may wait for the disk: they bound the memory.
const BYTES: usize = 512 << 20;
/// The least and the most batches that may, however many bytes they have.
const BATCHES: RangeInclusive<usize> = 3..=1024;
/// How long rows may be written before they count, although more are waiting.
const PERIOD: Duration = Duration::from_secs(1);

type Running = (SyncSender<Job>, JoinHandle<Result<RowFile>>);

/// A [`RowFile`] behind a thread. Dropping it keeps what has arrived.
pub struct Writer {
    target: Target,
    /// Until the first batch is there.
    opened: Option<RowFile>,
    running: Option<Running>,
}

impl Writer {
    pub fn new(target: Target) -> Self {
        Self { target, opened: None, running: None }
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
        self.opened = Some(RowFile::open(self.target.clone(), row, dtype)?);
        Ok(())
    }

    fn append(&mut self, rows: Box<dyn Rows + Send>, place: Place) -> Result<()> {
        let (sender, thread) = match (self.running.take(), self.opened.take()) {
            (Some(running), _) => running,
            (None, Some(file)) => start(file, rows.bytes().len())?,
            (None, None) => return Err(Error::internal("append() before begin()")),
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

/// `bytes`: of a batch; none that comes behind the first one is larger.
fn start(file: RowFile, bytes: usize) -> Result<Running> {
    let (sender, receiver) = sync_channel(waiting(bytes));
    let thread = std::thread::Builder::new().name("cnnrs-store".to_owned());
    let thread = thread.spawn(move || run(file, &receiver));
    Ok((sender, thread.map_err(|e| Error::Threads(format!("cannot start the thread that writes: {e}")))?))
}

/// How many batches of this size may wait.
fn waiting(bytes: usize) -> usize {
    BYTES.checked_div(bytes).unwrap_or(usize::MAX).clamp(*BATCHES.start(), *BATCHES.end())
}

fn join((sender, thread): (SyncSender<Job>, JoinHandle<Result<RowFile>>)) -> Result<RowFile> {
    drop(sender);
    thread.join().unwrap_or_else(|_| Err(Error::Panic("the thread that writes features panicked".to_owned())))
}

fn run(mut file: RowFile, jobs: &Receiver<Job>) -> Result<RowFile> {
    while let Ok((rows, place)) = jobs.recv() {
        file.write(rows.bytes(), place)?;
        // One flush for everything that has arrived during the last one.
        let began = Instant::now();
        while began.elapsed() < PERIOD {
            let Ok((rows, place)) = jobs.try_recv() else { break };
            file.write(rows.bytes(), place)?;
        }
        file.commit()?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_bounded_by_bytes() {
        assert_eq!(waiting(25 << 20), 20);
        assert_eq!([1 << 30, 1 << 10, 0].map(waiting), [3, 1024, 1024]);
    }

    struct Ones;

    impl Rows for Ones {
        fn shape(&self) -> Vec<usize> {
            vec![1, 2]
        }

        fn dtype(&self) -> Dtype {
            Dtype::Float16
        }

        fn bytes(&self) -> &[u8] {
            &[1; 4]
        }
    }

    #[test]
    fn rows_count_soon_although_more_could_come() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal");
        std::fs::write(&journal, "").unwrap();
        let path = folder.path().join("features.npy");
        let mut writer = Writer::new(Target { path, journal: Some(journal.clone()), total: Some(2), resume: false });
        writer.begin(&[2], Dtype::Float16).unwrap();
        let place = |row| Place { runs: vec![(row, 1)], ids: vec![String::new()] };
        writer.append(Box::new(Ones), place(0)).unwrap();
        let records = || std::fs::read_to_string(&journal).unwrap().lines().count();
        let late = Instant::now() + Duration::from_secs(60);
        while records() == 0 && Instant::now() < late {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(records(), 1);
        writer.append(Box::new(Ones), place(1)).unwrap();
        assert_eq!(writer.finish().unwrap(), [2, 2]);
        assert_eq!(records(), 2);
    }
}
