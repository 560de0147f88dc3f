use super::super::simd::{Kernel, Portable};
use super::*;

/// Small integers: every order of adding their products is exact.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + seed * 17) % 13) as f32 - 6.0).collect()
}

/// Convolution, pool, ReLU and scale by the definition: (values, origins).
fn reference(w: &ConvPool<'_>) -> (Vec<f32>, Vec<f32>) {
    let [rows, columns] = w.pooled;
    let (mut out, mut origins) = (vec![-7.0; w.out.len()], vec![-7.0; w.out.len()]);
    for (&o, &scale) in w.live.offsets.iter().zip(w.live.factors) {
        let o = o as usize;
        let conv = |y: usize, x: usize| {
            let mut sum = w.bias.map_or(0.0, |b| b[o]);
            for c in 0..w.channels {
                for ky in 0..w.k {
                    for kx in 0..w.k {
                        sum += w.weights[((o * w.channels + c) * w.k + ky) * w.k + kx]
                            * w.image[(c * w.height + y + ky) * w.width + x + kx];
                    }
                }
            }
            sum
        };
        for py in 0..rows {
            for px in 0..columns {
                let (mut best, mut origin) = (f32::NEG_INFINITY, 0);
                for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(y, x)| (2 * py + y, 2 * px + x)) {
                    let value = conv(y, x);
                    if value > best || value.is_nan() {
                        (best, origin) = (value, y * w.width + x);
                    }
                }
                let i = (o * rows + py) * columns + px;
                out[i] = scale * if w.relu && best < 0.0 { 0.0 } else { best };
                origins[i] = origin as f32;
            }
        }
    }
    (out, origins)
}

#[test]
fn conv_pool_like_the_definition() {
    let shapes = [
        (1, 28, 28, 5, 10),
        (3, 12, 40, 5, 7),
        (2, 9, 11, 3, 3),
        (10, 12, 12, 5, 20),
        (1, 6, 70, 3, 1),
        (4, 7, 21, 5, 4),
    ];
    for (channels, height, width, k, outs) in shapes {
        for relu in [true, false] {
            let mut image = numbers(channels * height * width, 1);
            if height == 9 {
                image[40] = f32::NAN;
            }
            image.resize(image.len() + SLACK, f32::NAN);
            let (weights, bias) = (numbers(outs * channels * k * k, 2), numbers(outs, 3));
            let pooled = [(height - k).div_ceil(2), (width - k).div_ceil(2)];
            let live: Vec<u32> = (0..outs as u32).filter(|o| o % 4 != 1).collect();
            let scales = vec![2.0; live.len()];
            let len = outs * pooled[0] * pooled[1];
            let mut results = Vec::new();
            for portable in [false, true] {
                let (mut out, mut origins) = (vec![-7.0; len], vec![-7.0; len]);
                let work = ConvPool {
                    image: &image,
                    channels,
                    height,
                    width,
                    weights: &weights,
                    bias: Some(&bias),
                    k,
                    relu,
                    live: Terms { offsets: &live, factors: &scales },
                    pooled,
                    out: &mut out,
                    origins: &mut origins,
                };
                let expected = reference(&work);
                match portable {
                    true => work.run::<Portable>(),
                    false => conv_pool(work),
                }
                results.push((out, origins, expected));
            }
            for (out, origins, expected) in results {
                let bits = |v: &[f32]| v.iter().map(|x| if x.is_nan() { 0 } else { x.to_bits() }).collect::<Vec<_>>();
                // -0 and 0 are the same value; adding 0 removes the difference.
                let plain = |v: &[f32]| bits(&v.iter().map(|x| x + 0.0).collect::<Vec<_>>());
                assert_eq!(plain(&out), plain(&expected.0), "{channels} {height} {width} {k} {outs}");
                assert_eq!(origins, expected.1, "{channels} {height} {width} {k} {outs}");
            }
        }
    }
}

#[test]
fn combine_like_two_loops() {
    for (rows, vectors) in (1..=5).flat_map(|r| (1..=19).map(move |v| (r, v))) {
        let (from_stride, to_stride) = (8 * vectors + 3, 8 * vectors + 1);
        let from = numbers(400 + rows * from_stride, 4);
        let offsets: Vec<u32> = (0..9).map(|i| i * 37).collect();
        let factors: Vec<f32> = (0..9).map(|i| i as f32 - 4.0).collect();
        let terms = Terms { offsets: &offsets, factors: &factors };
        for portable in [false, true] {
            let mut to = numbers(rows * to_stride, 5);
            let mut expected = to.clone();
            for r in 0..rows {
                for j in 0..8 * vectors {
                    for (offset, factor) in offsets.iter().zip(&factors) {
                        expected[r * to_stride + j] += factor * from[*offset as usize + r * from_stride + j];
                    }
                }
            }
            let work = Combine { terms, from: &from, from_stride, to: &mut to, to_stride, rows, vectors };
            match portable {
                true => work.run::<Portable>(),
                false => combine(work),
            }
            assert_eq!(to, expected, "{rows} {vectors}");
        }
    }
}

#[test]
fn gather_like_a_loop() {
    for (len, relu) in (0..40).flat_map(|len| [(len, false), (len, true)]) {
        let (mut y, mut dy) = (numbers(len, 1), numbers(len, 2));
        if len > 9 {
            (y[3], dy[3], y[9], dy[9]) = (f32::NAN, 1.0, 1.0, f32::NAN);
        }
        let origins: Vec<f32> = (0..len).map(|i| ((1 << 23) - 1 - 7 * i) as f32).collect();
        let pass = |i: usize| if relu && y[i] <= 0.0 { 0.0 } else { 0.5 * dy[i] };
        let kept: Vec<usize> = (0..len).filter(|&i| pass(i) != 0.0).collect();
        for portable in [false, true] {
            let mut grads = vec![7.0; len];
            let (mut offsets, mut factors) = (vec![0; len + OVERSHOOT], vec![0.0; len + OVERSHOOT]);
            let work = Gather {
                y: &y,
                dy: &dy,
                origins: &origins,
                scale: 0.5,
                relu,
                grads: &mut grads,
                unit: 3,
                offsets: &mut offsets,
                factors: &mut factors,
            };
            let (count, sum) = if portable { work.run::<Portable>() } else { gather(work) };
            let bits = |x: f32| if x.is_nan() { 1 } else { (x + 0.0).to_bits() };
            assert_eq!(count, kept.len());
            assert_eq!(bits(sum), bits((0..len).map(pass).sum()));
            assert!((0..len).all(|i| bits(grads[i]) == bits(pass(i))));
            for (t, &i) in kept.iter().enumerate() {
                assert_eq!((offsets[t], bits(factors[t])), (3 * position(origins[i]), bits(pass(i))));
            }
        }
    }
}

#[test]
fn positions_are_exact() {
    for i in [0u32, 1, 2, 1000, 65_537, (1 << 23) - 1] {
        assert_eq!(position(i as f32), i);
    }
}
