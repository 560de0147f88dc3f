//! What is wrong with image files: each is read, decoded and hashed, nothing is kept.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::data::buffers::Worker;
use crate::data::open::read;
use crate::error::{DecodeKind, Error, Result};
use crate::image::{self, Format, Limits};
use crate::threads;

#[derive(Debug, Default)]
pub struct Finding {
    /// By the first bytes of the file.
    pub format: Option<&'static str>,
    pub width: usize,
    pub height: usize,
    /// Bytes of the file.
    pub size: u64,
    /// Of the whole file; equal files have equal ones.
    pub hash: u64,
    pub error: Option<Error>,
}

impl Finding {
    /// Whose fault the error is. Only "broken" and "truncated" are about bytes that were read to the end.
    pub const fn fault(&self) -> Option<&'static str> {
        match self.error {
            None => None,
            Some(Error::Io { .. }) => Some("unreadable"),
            // More bytes than the limit are not read.
            Some(Error::TooLarge { .. }) => Some("limit"),
            Some(Error::Decode { kind: DecodeKind::TooLarge, .. }) => Some("limit"),
            Some(Error::Decode { kind: DecodeKind::Truncated, .. }) => Some("truncated"),
            Some(Error::Decode { .. }) => Some("broken"),
            Some(_) => Some("ours"),
        }
    }
}

/// One finding per file. `report` gets the number of files that are done every `pause`; its error ends the check.
///
/// # Errors
/// Only those of `report`.
pub fn files(
    paths: &[PathBuf],
    limits: &Limits,
    threads: usize,
    pause: Duration,
    mut report: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Finding>> {
    let findings: Vec<Mutex<Finding>> = paths.iter().map(|_| Mutex::default()).collect();
    let (cursor, finished, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let (alive, done) = mpsc::channel::<()>();
    let work = |alive: mpsc::Sender<()>| {
        let mut worker = Worker::default();
        let next = || Some(cursor.fetch_add(1, Ordering::Relaxed)).and_then(|i| paths.get(i).zip(findings.get(i)));
        while !stop.load(Ordering::Relaxed)
            && let Some((path, finding)) = next()
        {
            *finding.lock().unwrap_or_else(PoisonError::into_inner) = look_at(path, limits, &mut worker);
            finished.fetch_add(1, Ordering::Relaxed);
        }
        drop(alive);
    };
    let outcome = std::thread::scope(|scope| {
        for i in 0..threads.clamp(1, paths.len().max(1)) {
            let alive = alive.clone();
            let work = &work;
            threads::spawn(scope, i == 0, move || work(alive))?;
        }
        drop(alive);
        // The channel closes when the last thread ends.
        while done.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            if let Err(error) = report(finished.load(Ordering::Relaxed)) {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        report(finished.load(Ordering::Relaxed))
    });
    outcome?;
    Ok(findings.into_iter().map(|finding| finding.into_inner().unwrap_or_else(PoisonError::into_inner)).collect())
}

fn look_at(path: &Path, limits: &Limits, worker: &mut Worker) -> Finding {
    if let Err(error) = read(path, limits, &mut worker.file) {
        return Finding { error: Some(error), ..Finding::default() };
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(&worker.file);
    let finding = Finding {
        format: Format::of(&worker.file).map(name),
        size: worker.file.len() as u64,
        hash: hasher.finish(),
        ..Finding::default()
    };
    match image::decode(&worker.file, limits, &mut worker.image) {
        Ok(()) => Finding { width: worker.image.width, height: worker.image.height, ..finding },
        Err(error) => Finding { error: Some(error.at(path)), ..finding },
    }
}

/// As Pillow calls them.
const fn name(format: Format) -> &'static str {
    match format {
        Format::Jpeg => "JPEG",
        Format::Png => "PNG",
        Format::Gif => "GIF",
        Format::WebP => "WEBP",
        Format::Bmp => "BMP",
        Format::Tiff => "TIFF",
        Format::Pnm => "PPM",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_gets_its_finding() {
        let folder = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 4] = [
            ("good", b"P5 2 1 255\n\x01\x02"),
            ("text", b"hello"),
            ("same", b"P5 2 1 255\n\x01\x02"),
            ("cut", b"P5 9 9 255\n"),
        ];
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let paths = ["good", "text", "same", "cut", "gone"].map(|name| folder.path().join(name));
        let mut told = 0;
        let report = |done| {
            told = done;
            Ok(())
        };
        let found = super::files(&paths, &Limits::default(), 3, Duration::from_millis(1), report).unwrap();
        assert_eq!(told, 5);
        assert_eq!((found[0].format, found[0].width, found[0].height, found[0].size), (Some("PPM"), 2, 1, 13));
        assert!(found[0].error.is_none() && found[0].hash == found[2].hash && found[0].hash != found[1].hash);
        assert!(
            matches!(&found[1], Finding { format: None, error: Some(Error::Decode { path, .. }), .. } if *path == paths[1])
        );
        assert!(found[3].format == Some("PPM") && found[3].error.is_some());
        assert!(matches!(&found[4].error, Some(Error::Io { .. })));
        let faults = [None, Some("broken"), None, Some("truncated"), Some("unreadable")];
        assert_eq!(found.iter().map(Finding::fault).collect::<Vec<_>>(), faults);
        for limits in [Limits { bytes: 9, ..Limits::default() }, Limits { pixels: 1, ..Limits::default() }] {
            let found = super::files(&paths[..1], &limits, 1, Duration::from_millis(1), |_| Ok(())).unwrap();
            assert_eq!(found[0].fault(), Some("limit"));
        }
        let stopped =
            super::files(&paths, &Limits::default(), 1, Duration::from_millis(1), |_| Err(Error::Interrupted));
        assert!(matches!(stopped, Err(Error::Interrupted)));
    }
}
