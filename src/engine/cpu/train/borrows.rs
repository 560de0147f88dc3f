//! With debug assertions: who has which floats, and a panic where two have the same and one of them may write.
//!
//! Within a worker what counts is whether both exist at the same time; between workers, whether both existed between
//! the same two barriers, so that a fault shows even when the threads happen to run one after the other.

#[cfg(debug_assertions)]
pub use checked::{Borrows, Held};
#[cfg(not(debug_assertions))]
pub use unchecked::{Borrows, Held};

#[cfg(not(debug_assertions))]
mod unchecked {
    use std::marker::PhantomData;

    use super::super::memory::Part;

    pub struct Borrows;

    pub struct Held<'a>(PhantomData<&'a ()>);

    impl Borrows {
        pub fn new(_workers: usize) -> Self {
            Self
        }

        pub fn begin(&self) {}

        #[inline(always)]
        pub fn meet(&self, _worker: usize) {}

        #[inline(always)]
        pub fn hold(&self, _worker: usize, _part: Part, _write: bool) -> Held<'_> {
            Held(PhantomData)
        }
    }
}

#[cfg(debug_assertions)]
#[allow(clippy::panic)] // an overlap is a fault of ours, and only tests look for it
mod checked {
    use std::collections::BTreeMap;
    use std::panic::{Location, panic_any};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::super::memory::Part;

    /// Where a slice was taken.
    type Site = &'static Location<'static>;

    pub struct Borrows {
        workers: Vec<Mutex<Worker>>,
    }

    /// What a worker has and, since the last barrier, had.
    #[derive(Default)]
    struct Worker {
        /// Barriers passed.
        phase: usize,
        /// Number of the next slice.
        next: usize,
        live: Vec<(usize, Slice)>,
        read: Ranges,
        written: Ranges,
    }

    #[derive(Clone, Copy)]
    struct Slice {
        start: usize,
        end: usize,
        write: bool,
        site: Site,
    }

    /// Disjoint ranges of addresses: start, and end with the last place that took a part.
    #[derive(Default)]
    struct Ranges(BTreeMap<usize, (usize, Site)>);

    impl Ranges {
        fn add(&mut self, slice: &Slice) {
            let (mut start, mut end) = (slice.start, slice.end);
            while let Some((&first, &(last, _))) = self.0.range(..=end).next_back().filter(|(_, old)| old.0 >= start) {
                self.0.remove(&first);
                (start, end) = (start.min(first), end.max(last));
            }
            self.0.insert(start, (end, slice.site));
        }

        fn overlapping(&self, slice: &Slice) -> Option<Site> {
            self.0.range(..slice.end).next_back().filter(|(_, old)| old.0 > slice.start).map(|(_, old)| old.1)
        }
    }

    impl Worker {
        fn remember(&mut self, slice: &Slice) {
            if slice.write { self.written.add(slice) } else { self.read.add(slice) }
        }
    }

    /// Until this is dropped, a worker has a slice.
    pub struct Held<'a> {
        borrows: &'a Borrows,
        worker: usize,
        number: usize,
    }

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.borrows.worker(self.worker).live.retain(|(number, _)| *number != self.number);
        }
    }

    impl Borrows {
        pub fn new(workers: usize) -> Self {
            Self { workers: (0..workers).map(|_| Mutex::default()).collect() }
        }

        fn worker(&self, worker: usize) -> MutexGuard<'_, Worker> {
            self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// A job begins; nobody has anything.
        pub fn begin(&self) {
            (0..self.workers.len()).for_each(|worker| *self.worker(worker) = Worker::default());
        }

        /// A worker has passed a barrier.
        pub fn meet(&self, worker: usize) {
            let mut worker = self.worker(worker);
            worker.phase += 1;
            (worker.read, worker.written) = Default::default();
            let live: Vec<Slice> = worker.live.iter().map(|(_, slice)| *slice).collect();
            live.iter().for_each(|slice| worker.remember(slice));
        }

        #[track_caller]
        pub fn hold(&self, worker: usize, part: Part, write: bool) -> Held<'_> {
            let start = part.start.addr();
            let slice = Slice { start, end: start + size_of::<f32>() * part.len, write, site: Location::caller() };
            let (phase, number) = self.take(worker, slice);
            let held = Held { borrows: self, worker, number };
            for other in (0..self.workers.len()).filter(|&other| other != worker && part.len > 0) {
                let theirs = self.worker(other);
                let clash = theirs.written.overlapping(&slice);
                let clash = clash.or_else(|| if write { theirs.read.overlapping(&slice) } else { None });
                if let Some(site) = clash.filter(|_| theirs.phase == phase) {
                    drop(theirs);
                    let (does, now) = (if write { "writes" } else { "reads" }, slice.site);
                    panic_any(format!(
                        "worker {worker} {does} at {now} what worker {other} has at {site}: no barrier between"
                    ));
                }
            }
            held
        }

        /// Adds to what a worker has; its phase and the number of the slice.
        #[track_caller]
        fn take(&self, worker: usize, slice: Slice) -> (usize, usize) {
            let mut own = self.worker(worker);
            let number = own.next;
            own.next += 1;
            if slice.start < slice.end {
                let overlaps =
                    |old: &Slice| old.start < slice.end && slice.start < old.end && (old.write || slice.write);
                let clash = own.live.iter().map(|(_, old)| *old).find(overlaps);
                if let Some(old) = clash {
                    drop(own);
                    let (now, before) = (slice.site, old.site);
                    panic_any(format!(
                        "worker {worker} takes at {now} what it still has from {before}, and one of them writes"
                    ));
                }
                own.live.push((number, slice));
                own.remember(&slice);
            }
            (own.phase, number)
        }
    }

    #[cfg(test)]
    mod tests {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        use super::*;

        fn part(floats: &mut [f32], range: std::ops::Range<usize>) -> Part {
            let part = &mut floats[range];
            Part { start: part.as_mut_ptr(), len: part.len() }
        }

        fn fault(work: impl FnOnce()) -> String {
            let payload = catch_unwind(AssertUnwindSafe(work)).unwrap_err();
            payload.downcast_ref::<String>().unwrap().clone()
        }

        #[test]
        fn what_a_worker_still_has_cannot_be_written() {
            let (mut floats, borrows) = ([0.0; 8], Borrows::new(1));
            let (left, middle, right) = (part(&mut floats, 0..4), part(&mut floats, 3..5), part(&mut floats, 4..8));
            for (first, second) in [(true, false), (false, true), (true, true)] {
                let _held = borrows.hold(0, left, first);
                let message = fault(|| drop(borrows.hold(0, middle, second)));
                assert!(message.contains("still has from") && message.contains("borrows.rs"), "{message}");
                drop(borrows.hold(0, right, true));
            }
            let _held = (borrows.hold(0, left, false), borrows.hold(0, middle, false));
            drop(borrows.hold(0, part(&mut floats, 5..8), true));
        }

        #[test]
        fn what_another_worker_had_since_the_barrier_cannot_be_written() {
            let (mut floats, borrows) = ([0.0; 8], Borrows::new(2));
            let (left, middle, right) = (part(&mut floats, 0..4), part(&mut floats, 3..5), part(&mut floats, 4..8));
            for (first, second) in [(true, false), (false, true), (true, true)] {
                drop(borrows.hold(0, left, first));
                drop(borrows.hold(1, right, second));
                let message = fault(|| drop(borrows.hold(1, middle, second)));
                assert!(message.contains("no barrier between"), "{message}");
                (0..2).for_each(|worker| borrows.meet(worker));
                drop(borrows.hold(1, middle, second));
                borrows.begin();
            }
            // What is kept over a barrier counts after it, too.
            let _held = borrows.hold(0, left, true);
            (0..2).for_each(|worker| borrows.meet(worker));
            assert!(fault(|| drop(borrows.hold(1, middle, false))).contains("worker 1 reads"));
        }

        #[test]
        fn ranges_grow_together() {
            let mut ranges = Ranges::default();
            let slice = |start, end| Slice { start, end, write: false, site: Location::caller() };
            [(0, 4), (8, 12), (20, 24), (4, 9)].into_iter().for_each(|(start, end)| ranges.add(&slice(start, end)));
            assert_eq!(ranges.0.iter().map(|(&start, old)| (start, old.0)).collect::<Vec<_>>(), [(0, 12), (20, 24)]);
            assert!(ranges.overlapping(&slice(12, 20)).is_none() && ranges.overlapping(&slice(23, 30)).is_some());
        }
    }
}
