use super::*;

/// Small integers: every order of adding their products is exact.
pub fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + seed * 17) % 13) as f32 - 6.0).collect()
}

/// Convolution, pool, ReLU and scale by the definition: (values, origins).
fn reference(w: &Direct<'_>) -> (Vec<f32>, Vec<f32>) {
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
        (2, 10, 10, 3, 23),
        (1, 8, 37, 3, 13),
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
            for isa in Isa::available() {
                let (mut out, mut origins) = (vec![-7.0; len], vec![-7.0; len]);
                let work = Direct {
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
                dispatch(isa, work);
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
