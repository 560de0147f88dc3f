//! Windows of an image: in the middle, given, or drawn; and borders around it.

#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;

use super::Image;
use super::draw::{below, between};
use crate::error::Result;
use crate::memory;

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

impl Window {
    pub(super) fn lies_in(self, image: &Image) -> bool {
        let ends_in = |start: usize, length: usize, limit| start.checked_add(length).is_some_and(|end| end <= limit);
        self.height > 0
            && self.width > 0
            && ends_in(self.top, self.height, image.height)
            && ends_in(self.left, self.width, image.width)
    }
}

/// The pixels of `window`, which lies in the image.
///
/// # Errors
/// When there is no memory for them.
pub fn crop(image: &Image, window: Window, out: &mut Image) -> Result<()> {
    let pixel = image.layout.bytes_per_pixel();
    out.reshape(window.width, window.height, image.layout)?;
    for (y, line) in out.data.chunks_exact_mut(window.width * pixel).enumerate() {
        let start = ((window.top + y) * image.width + window.left) * pixel;
        line.copy_from_slice(&image.data[start..start + line.len()]);
    }
    Ok(())
}

/// What a border is made of, as torchvision and `numpy.pad` call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PadMode {
    /// One colour.
    #[default]
    Constant,
    /// The outermost pixels.
    Edge,
    /// The image mirrored, without its outermost pixels.
    Reflect,
    /// The image mirrored.
    Symmetric,
}

impl PadMode {
    /// Where position `at` of the padded line comes from, for `length` pixels behind `before` of border.
    fn source(self, at: usize, before: usize, length: usize) -> Option<usize> {
        let at = at as isize - before as isize;
        let last = length as isize - 1;
        let mirrored = |period: isize| {
            let place = at.rem_euclid(period);
            place.min(period - 1 - place)
        };
        let source = match self {
            Self::Constant => return usize::try_from(at).ok().filter(|&at| at < length),
            Self::Edge => at.clamp(0, last),
            Self::Symmetric => mirrored(2 * length as isize),
            // There is nothing to mirror in a single pixel: numpy repeats it.
            Self::Reflect if last == 0 => 0,
            Self::Reflect => {
                let place = at.rem_euclid(2 * last);
                place.min(2 * last - place)
            }
        };
        Some(source.unsigned_abs())
    }
}

/// Borders on the left, top, right and bottom, as torchvision orders them; `fill` is the colour of
/// [`PadMode::Constant`] (its first channel for gray images).
///
/// # Errors
/// When there is no memory for the result.
pub fn pad(
    image: &Image,
    [left, top, right, bottom]: [usize; 4],
    fill: [u8; 3],
    mode: PadMode,
    out: &mut Image,
) -> Result<()> {
    let pixel = image.layout.bytes_per_pixel();
    let stride = image.stride();
    let side = |before: usize, length: usize, behind: usize| before.saturating_add(length).saturating_add(behind);
    out.reshape(side(left, image.width, right), side(top, image.height, bottom), image.layout)?;
    let fill = [fill[0], fill[1], fill[2], 0];
    // The table of columns.
    memory::probe(16 * out.width)?;
    let columns: Vec<_> = (0..out.width).map(|x| mode.source(x, left, image.width)).collect();
    let out_stride = out.stride().max(1);
    for (y, line) in out.data.chunks_exact_mut(out_stride).enumerate() {
        let row = mode.source(y, top, image.height).map(|y| &image.data[y * stride..][..stride]);
        let (before, rest) = line.split_at_mut(left * pixel);
        let (inside, behind) = rest.split_at_mut(stride);
        for (border, columns) in [(before, &columns[..left]), (behind, &columns[left + image.width..])] {
            for (value, column) in border.chunks_exact_mut(pixel).zip(columns) {
                value.copy_from_slice(row.zip(*column).map_or(&fill[..pixel], |(row, x)| &row[x * pixel..][..pixel]));
            }
        }
        match row {
            Some(row) => inside.copy_from_slice(row),
            None => inside.chunks_exact_mut(pixel).for_each(|value| value.copy_from_slice(&fill[..pixel])),
        }
    }
    Ok(())
}

/// The middle `height x width` pixels; where the image is smaller it is centred on zeros first.
///
/// # Errors
/// When there is no memory for them.
pub fn center_crop(image: &Image, height: usize, width: usize, out: &mut Image) -> Result<()> {
    let pixel = image.layout.bytes_per_pixel();
    out.reshape(width, height, image.layout)?;
    let (padding_top, top, rows) = middle(image.height, height);
    let (padding_left, left, columns) = middle(image.width, width);
    if rows < height || columns < width {
        out.data.fill(0);
    }
    for y in 0..rows {
        let from = &image.data[((top + y) * image.width + left) * pixel..][..columns * pixel];
        out.data[((padding_top + y) * width + padding_left) * pixel..][..columns * pixel].copy_from_slice(from);
    }
    Ok(())
}

/// Along one axis: zeros in front, first input position, positions taken.
fn middle(input: usize, output: usize) -> (usize, usize, usize) {
    if output > input {
        ((output - input) / 2, 0, input)
    } else {
        // Python's round: a half goes to the even neighbour.
        let half = (input - output) / 2;
        (0, half + usize::from((input - output) % 2 == 1 && half % 2 == 1), output)
    }
}

/// Height and width after `pad_if_needed`, which puts what is missing on both sides.
pub(super) fn padded_size(image: &Image, height: usize, width: usize, pad_if_needed: bool) -> (usize, usize) {
    let padded = |have: usize, want: usize| {
        if pad_if_needed && have < want { want.saturating_mul(2) - have } else { have }
    };
    (padded(image.height, height), padded(image.width, width))
}

/// `RandomCrop`: any position with the same chance. Where the image is too small the window sticks out, and is refused.
pub(super) fn random_window(rng: &mut ChaCha8Rng, rows: usize, columns: usize, height: usize, width: usize) -> Window {
    let top = below(rng, rows.saturating_sub(height) + 1);
    Window { top, left: below(rng, columns.saturating_sub(width) + 1), height, width }
}

/// `RandomResizedCrop`: an area and an aspect ratio, ten tries to fit them, then the middle.
pub(super) fn random_resized_window(
    rng: &mut ChaCha8Rng,
    rows: usize,
    columns: usize,
    scale: (f64, f64),
    ratio: (f64, f64),
) -> Window {
    let area = (rows * columns) as f64;
    let (low, high) = ((ratio.0 as f32).ln(), (ratio.1 as f32).ln());
    for _ in 0..10 {
        let target = area * f64::from(between(rng, scale.0 as f32, scale.1 as f32));
        let aspect = f64::from(between(rng, low, high).exp());
        let width = (target * aspect).sqrt().round_ties_even() as usize;
        let height = (target / aspect).sqrt().round_ties_even() as usize;
        if (1..=columns).contains(&width) && (1..=rows).contains(&height) {
            return random_window(rng, rows, columns, height, width);
        }
    }
    let (narrowest, widest) = (ratio.0.min(ratio.1), ratio.0.max(ratio.1));
    let own = columns as f64 / rows as f64;
    let (height, width) = if own < narrowest {
        ((columns as f64 / narrowest).round_ties_even() as usize, columns)
    } else if own > widest {
        (rows, (rows as f64 * widest).round_ties_even() as usize)
    } else {
        (rows, columns)
    };
    Window { top: (rows - height) / 2, left: (columns - width) / 2, height, width }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Key;

    #[test]
    fn drawn_windows_fit_and_spread_as_torchvisions() {
        let mut rng = Key::default().rng();
        let (mut areas, mut aspects, mut tops) = (0.0, 0.0, 0.0);
        let count = 20_000;
        for _ in 0..count {
            let w = random_resized_window(&mut rng, 400, 300, (0.08, 0.5), (0.75, 4.0 / 3.0));
            assert!(w.top + w.height <= 400 && w.left + w.width <= 300);
            areas += (w.height * w.width) as f64 / 120_000.0 / f64::from(count);
            aspects += (w.width as f64 / w.height as f64).ln() / f64::from(count);
            tops += w.top as f64 / (400 - w.height) as f64 / f64::from(count);
        }
        // Uniform area on [0.08, 0.5): mean 0.29, deviation 0.121 / sqrt(20000) = 0.0009. Rounding sides moves the mean
        // by less. Log-uniform aspect, symmetric: mean 0, deviation 0.166 / sqrt(20000) = 0.0012. Tops: 0.29 / 141.
        assert!((areas - 0.29).abs() < 0.005, "{areas}");
        assert!(aspects.abs() < 0.007, "{aspects}");
        assert!((tops - 0.5).abs() < 0.011, "{tops}");
    }

    #[test]
    fn what_never_fits_is_taken_from_the_middle() {
        let mut rng = Key::default().rng();
        let wide = random_resized_window(&mut rng, 10, 1000, (0.9, 1.0), (0.75, 4.0 / 3.0));
        assert_eq!(wide, Window { top: 0, left: 493, height: 10, width: 13 });
        let tall = random_resized_window(&mut rng, 1000, 10, (0.9, 1.0), (0.75, 4.0 / 3.0));
        assert_eq!(tall, Window { top: 493, left: 0, height: 13, width: 10 });
    }

    #[test]
    fn all_positions_are_drawn() {
        let mut rng = Key::default().rng();
        let mut seen = [0u32; 12];
        for _ in 0..12_000 {
            let w = random_window(&mut rng, 10, 9, 8, 6);
            seen[w.top * 4 + w.left] += 1;
        }
        // Binomial(12000, 1 / 12): five deviations are 151.
        assert!(seen.iter().all(|n| n.abs_diff(1000) < 151), "{seen:?}");
    }
}
