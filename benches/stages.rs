//! Where the time of one image goes, and how fast decoding alone would be.
//!
//! `stages FOLDER` prints milliseconds per image on one thread, as JSON. `stages FOLDER --decode THREADS` waits for a
//! line on its standard input, decodes every file once on that many threads, prints how many there were, and waits again:
//! so `run.py` measures it in turn with the others.
#![expect(clippy::print_stdout, reason = "the result goes to run.py through a pipe")]

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cnnrs::image::{
    Entropy, Filter, Finish, Image, Key, Limits, Op, PillowOrder, ReadOptions, Scratch, Size, Transform, decode,
    decode_jpeg, decode_with,
};

const ROUNDS: usize = 9;
/// The last three in place of others: resize and normalise in one go, decoding at a smaller scale, libjpeg alone.
const STAGES: [&str; 7] = ["read", "decode", "resize", "normalise", "fused", "scaled", "decode_libjpeg"];

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let folder = arguments.first().ok_or("usage: stages FOLDER [--decode THREADS]")?;
    let mut files = Vec::new();
    collect(Path::new(folder), &mut files)?;
    files.sort();
    if let Some(threads) = arguments.iter().position(|a| a == "--decode").and_then(|i| arguments.get(i + 1)) {
        return serve(&files, threads.parse()?);
    }
    let medians = stages(&files)?;
    let figures: Vec<_> = STAGES.iter().zip(medians).map(|(stage, ms)| format!("\"{stage}\": {ms:.4}")).collect();
    println!("{{{}, \"images\": {}, \"rounds\": {ROUNDS}}}", figures.join(", "), files.len());
    Ok(())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Mean over the files of the median over the rounds: a busy moment of the machine hits single rounds only.
fn stages(files: &[PathBuf]) -> Result<[f64; STAGES.len()], Box<dyn Error>> {
    let size = Size::Exact { height: 224, width: 224 };
    let resize = Op::Resize { size, filter: Filter::Bilinear };
    let finish = Finish::Normalize { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] };
    let transform = Transform { ops: vec![resize], finish, erase: None, order: PillowOrder::Pillow13 };
    let (mut image, mut scratch, mut bytes) = (Image::default(), Scratch::default(), Vec::new());
    let mut out = vec![0.0; 3 * 224 * 224];
    let mut seconds = vec![[[0.0; ROUNDS]; STAGES.len()]; files.len()];
    for round in 0..=ROUNDS {
        for (file, seconds) in files.iter().zip(&mut seconds) {
            let mut at = [Instant::now(); STAGES.len() + 1];
            read(file, &mut bytes)?;
            at[1] = Instant::now();
            decode(&bytes, &Limits::default(), &mut image)?;
            at[2] = Instant::now();
            transform.pixels(&mut image, Key::default(), &mut scratch)?;
            at[3] = Instant::now();
            transform.finish_f32(&image, &mut scratch, &mut out)?;
            at[4] = Instant::now();
            decode(&bytes, &Limits::default(), &mut image)?;
            transform.apply_f32(&mut image, Key::default(), &mut scratch, &mut out)?;
            at[5] = Instant::now();
            decode_with(&bytes, &ReadOptions { scaled: Some(size), ..ReadOptions::default() }, &mut image)?;
            at[6] = Instant::now();
            decode_jpeg(Entropy::Libjpeg, &bytes, &Limits::default(), None, &mut image)?;
            at[7] = Instant::now();
            // Round 0 warms up.
            if let Some(round) = round.checked_sub(1) {
                for (stage, two) in seconds.iter_mut().zip(at.windows(2)) {
                    stage[round] = (two[1] - two[0]).as_secs_f64();
                }
            }
        }
    }
    let mut total = [0.0; STAGES.len()];
    for file in &mut seconds {
        for (stage, total) in file.iter_mut().zip(&mut total) {
            stage.sort_by(f64::total_cmp);
            *total += 1000.0 * stage[ROUNDS / 2] / files.len() as f64;
        }
    }
    // Measured with a decode in front, because the operations work in place.
    total[4] -= total[1];
    Ok(total)
}

fn read(file: &Path, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    bytes.clear();
    std::io::Read::read_to_end(&mut std::fs::File::open(file)?, bytes).map(|_| ())
}

fn serve(files: &[PathBuf], threads: usize) -> Result<(), Box<dyn Error>> {
    let contents = files.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let next = AtomicUsize::new(0);
        let failed = std::thread::scope(|scope| {
            let workers = (0..threads).map(|_| {
                scope.spawn(|| {
                    let mut image = Image::default();
                    while let Some(bytes) = contents.get(next.fetch_add(1, Ordering::Relaxed)) {
                        // libjpeg-turbo alone: the bound that others have too.
                        decode_jpeg(Entropy::Libjpeg, bytes, &Limits::default(), None, &mut image)?;
                    }
                    Ok(())
                })
            });
            let workers: Vec<_> = workers.collect();
            workers.into_iter().find_map(|worker| worker.join().ok().and_then(cnnrs::error::Result::err))
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        println!("{}", files.len());
        std::io::stdout().flush()?;
    }
    Ok(())
}
