//! Pixels for comparison with Pillow: each argument pair `file spec` becomes `height width bytes...` on standard output.
//! Specs: `decode`, `resize:H:W:filter:order`, `tensor:H:W` (normalised with ImageNet's constants, f32).
//! `bench:H:W:rounds` over all remaining files prints milliseconds per image instead.

use std::io::Write;
use std::time::Instant;

use cnnrs::image::{Filter, Finish, Image, Key, Limits, Op, PillowOrder, Scratch, Size, Transform, decode};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(spec) = args.first().filter(|a| a.starts_with("bench:")) {
        return bench(spec, &args[1..]);
    }
    let mut out = std::io::stdout().lock();
    for pair in args.chunks(2) {
        let [file, spec] = pair else { return Err("arguments come in pairs: file spec".into()) };
        let fields: Vec<&str> = spec.split(':').collect();
        let mut image = Image::default();
        if let Err(error) = decode(&std::fs::read(file)?, &Limits::default(), &mut image) {
            eprintln!("{file}: {error}");
            out.write_all(&[0; 8])?;
            continue;
        }
        if fields[0] == "resize" {
            let filter = match fields[3] {
                "nearest" => Filter::Nearest,
                "bilinear" => Filter::Bilinear,
                "bicubic" => Filter::Bicubic,
                "box" => Filter::Box,
                "hamming" => Filter::Hamming,
                "lanczos" => Filter::Lanczos,
                other => return Err(other.into()),
            };
            let order = if fields[4] == "pillow13" { PillowOrder::Pillow13 } else { PillowOrder::HorizontalFirst };
            cnnrs::image::resize(&mut image, fields[1].parse()?, fields[2].parse()?, filter, order);
        }
        if fields[0] == "tensor" {
            let transform = photo_transform(fields[1].parse()?, fields[2].parse()?);
            let (c, h, w) = transform.output_shape().ok_or("no shape")?;
            let mut values = vec![0f32; c * h * w];
            transform.apply_f32(&mut image, Key::default(), &mut Scratch::default(), &mut values)?;
            out.write_all(&u32::try_from(h)?.to_le_bytes())?;
            out.write_all(&u32::try_from(w)?.to_le_bytes())?;
            out.write_all(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())?;
            continue;
        }
        out.write_all(&u32::try_from(image.height)?.to_le_bytes())?;
        out.write_all(&u32::try_from(image.width)?.to_le_bytes())?;
        out.write_all(&image.to_packed())?;
    }
    Ok(())
}

fn photo_transform(height: usize, width: usize) -> Transform {
    Transform {
        ops: vec![Op::Resize { size: Size::Exact { height, width }, filter: Filter::Bilinear }],
        finish: Finish::Normalize { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] },
        erase: None,
        order: PillowOrder::Pillow13,
    }
}

/// Medians over the rounds of the time per image: decode, operations, finish.
fn bench(spec: &str, files: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let fields: Vec<&str> = spec.split(':').collect();
    let (height, width, rounds): (usize, usize, usize) = (fields[1].parse()?, fields[2].parse()?, fields[3].parse()?);
    let transform = photo_transform(height, width);
    let files = files.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    let (mut image, mut scratch) = (Image::default(), Scratch::default());
    let mut values = vec![0f32; 3 * height * width];
    let mut times = Vec::new();
    for _ in 0..rounds {
        let mut spent = [0.0; 3];
        for bytes in &files {
            let start = Instant::now();
            decode(bytes, &Limits::default(), &mut image)?;
            let decoded = Instant::now();
            transform.pixels(&mut image, Key::default(), &mut scratch)?;
            let resized = Instant::now();
            transform.finish_f32(&image, &mut scratch, &mut values)?;
            for (total, span) in spent.iter_mut().zip([decoded - start, resized - decoded, resized.elapsed()]) {
                *total += span.as_secs_f64() * 1e3 / files.len() as f64;
            }
        }
        times.push(spent);
    }
    for (stage, name) in ["decode", "resize", "normalize"].into_iter().enumerate() {
        let mut stage_times: Vec<f64> = times.iter().map(|t| t[stage]).collect();
        stage_times.sort_by(f64::total_cmp);
        let median = stage_times[stage_times.len() / 2];
        writeln!(
            std::io::stdout(),
            "{name:>10} {median:.3} ms per image ({:.3} to {:.3})",
            stage_times[0],
            stage_times[rounds - 1]
        )?;
    }
    Ok(())
}
