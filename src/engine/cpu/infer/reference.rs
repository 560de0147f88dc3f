//! What the operations mean, in float64 and without any cleverness: what the tests compare with.

use crate::engine::cpu::common::kernels::activate::exact_erf;
use crate::model::{self, APART, Activation, Bias, Graph, Op, Pair, Scores, Windows};

/// The value of the graph's output for NCHW inputs.
pub fn run(graph: &Graph, tensors: &[Vec<f32>], input: &[f32], shape: &[usize]) -> Vec<f64> {
    let shapes = model::shapes(graph, shape).unwrap();
    let mut values: Vec<Vec<f64>> = Vec::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let (out, from) = (&shapes[index], node.inputs.first().map(|&i| &shapes[i]));
        let x = node.inputs.first().map_or(&[][..], |&i| &values[i]);
        let side = |s: &[usize]| -> Pair { [s[2], s[3]] };
        let tensor = |t: Option<usize>, i: usize, or: f64| t.map_or(or, |t| f64::from(tensors[t][i]));
        let mut y = vec![0.0; out.iter().product()];
        match &node.op {
            Op::Input => y.iter_mut().zip(input).for_each(|(y, &x)| *y = f64::from(x)),
            Op::Conv2d { weight, bias, stride, padding, dilation, groups } => {
                let (from, w) = (from.unwrap(), &graph.tensors[*weight]);
                let (inp, [h, wd]) = (w[1], side(from));
                each(out, |[n, o, oy, ox], at| {
                    let mut sum = tensor(*bias, o, 0.0);
                    for i in 0..inp {
                        let c = o / (w[0] / groups) * inp + i;
                        for ky in 0..w[2] {
                            for kx in 0..w[3] {
                                let (y, x_) = (oy * stride[0] + ky * dilation[0], ox * stride[1] + kx * dilation[1]);
                                let (Some(y), Some(x_)) = (y.checked_sub(padding[0]), x_.checked_sub(padding[1]))
                                else {
                                    continue;
                                };
                                if y < h && x_ < wd {
                                    let f = tensors[*weight][((o * inp + i) * w[2] + ky) * w[3] + kx];
                                    sum += f64::from(f) * x[((n * from[1] + c) * h + y) * wd + x_];
                                }
                            }
                        }
                    }
                    y[at] = sum;
                });
            }
            Op::Linear { weight, bias } => {
                let ([outs, f], w) = (graph.tensors[*weight][..].try_into().unwrap(), &tensors[*weight]);
                for (at, y) in y.iter_mut().enumerate() {
                    let (n, o) = (at / outs, at % outs);
                    *y = tensor(*bias, o, 0.0) + (0..f).map(|i| f64::from(w[o * f + i]) * x[n * f + i]).sum::<f64>();
                }
            }
            Op::BatchNorm2d { weight, bias, running_mean, running_var, eps, .. } => each(out, |[_, c, ..], at| {
                let (mean, var) = (tensor(*running_mean, c, 0.0), tensor(*running_var, c, 1.0));
                y[at] = (x[at] - mean) / (var + eps).sqrt() * tensor(*weight, c, 1.0) + tensor(*bias, c, 0.0);
            }),
            Op::Activation { function, .. } => y.iter_mut().zip(x).for_each(|(y, &x)| *y = activation(*function, x)),
            Op::MaxPool2d { kernel, stride, padding, dilation, .. } => {
                let from = from.unwrap();
                each(out, |[n, c, oy, ox], at| {
                    y[at] = taps([oy, ox], *kernel, *stride, *padding, *dilation, side(from))
                        .map(|[y, x_]| x[((n * from[1] + c) * from[2] + y) * from[3] + x_])
                        .fold(f64::NEG_INFINITY, f64::max);
                });
            }
            Op::AvgPool2d { kernel, stride, padding, count_include_pad, divisor, .. } => {
                let from = from.unwrap();
                each(out, |[n, c, oy, ox], at| {
                    let values: Vec<f64> = taps([oy, ox], *kernel, *stride, *padding, [1, 1], side(from))
                        .map(|[y, x_]| x[((n * from[1] + c) * from[2] + y) * from[3] + x_])
                        .collect();
                    let reach = |i: usize, o: usize| {
                        (o * stride[i] + kernel[i]).min(from[2 + i] + 2 * padding[i]) - o * stride[i]
                    };
                    let padded = reach(0, oy) * reach(1, ox);
                    let count = divisor.unwrap_or(if *count_include_pad { padded } else { values.len() });
                    y[at] = values.iter().sum::<f64>() / count as f64;
                });
            }
            Op::Mean { dims, .. } => {
                let from = from.unwrap();
                let rank = from.len();
                let gone = |d: usize| dims.iter().any(|&dim| (dim + rank as i64) % rank as i64 == d as i64);
                let count: usize = (0..rank).filter(|&d| gone(d)).map(|d| from[d]).product();
                each(&wide(from), |place, at| {
                    let kept = (0..rank).filter(|&d| !gone(d));
                    y[kept.fold(0, |to, d| to * from[d] + place[d])] += x[at] / count as f64;
                });
            }
            Op::AdaptiveAvgPool2d { .. } => {
                let (from, to) = (from.unwrap(), &out[2..]);
                let range = |i: usize, o: usize| o * from[2 + i] / to[i]..((o + 1) * from[2 + i]).div_ceil(to[i]);
                each(&[out[0], out[1], to[0], to[1]], |[n, c, oy, ox], at| {
                    let (ys, xs) = (range(0, oy), range(1, ox));
                    let count = ys.len() * xs.len();
                    let plane = &x[(n * from[1] + c) * from[2] * from[3]..];
                    let sum: f64 = ys.flat_map(|y| xs.clone().map(move |x_| plane[y * from[3] + x_])).sum();
                    y[at] = sum / count as f64;
                });
            }
            Op::Softmax { log, .. } => each(&[out[0], out[1], out.iter().skip(2).product(), 1], |[n, c, p, _], at| {
                let pixels: usize = out.iter().skip(2).product();
                let value = |c: usize| x[(n * out[1] + c) * pixels + p];
                let total: f64 = (0..out[1]).map(|c| value(c).exp()).sum();
                y[at] = if *log { value(c) - total.ln() } else { value(c).exp() / total };
            }),
            Op::LayerNorm { shape, weight, bias, eps } => {
                let len: usize = shape.iter().product();
                for (y, x) in y.chunks_exact_mut(len).zip(x.chunks_exact(len)) {
                    let mean = x.iter().sum::<f64>() / len as f64;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / len as f64;
                    for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                        *y = (x - mean) / (variance + eps).sqrt() * tensor(*weight, i, 1.0) + tensor(*bias, i, 0.0);
                    }
                }
            }
            Op::GroupNorm { groups, weight, bias, eps } => {
                let pixels = out[2] * out[3];
                let len = out[1] / groups * pixels;
                for (group, (y, x)) in y.chunks_exact_mut(len).zip(x.chunks_exact(len)).enumerate() {
                    let mean = x.iter().sum::<f64>() / len as f64;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / len as f64;
                    for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                        let c = group % groups * (out[1] / groups) + i / pixels;
                        *y = (x - mean) / (variance + eps).sqrt() * tensor(*weight, c, 1.0) + tensor(*bias, c, 0.0);
                    }
                }
            }
            Op::ResponseNorm { dims, weight, bias, eps } => {
                let channel = (1..4).find(|dim| !dims.contains(&(*dim as i64))).unwrap();
                let mut squares = vec![0.0; out[0] * out[channel]];
                each(out, |place, at| squares[place[0] * out[channel] + place[channel]] += x[at] * x[at]);
                let norms: Vec<f64> = squares.iter().map(|s: &f64| s.sqrt()).collect();
                each(out, |place, at| {
                    let (n, c) = (place[0], place[channel]);
                    let mean = norms[n * out[channel]..][..out[channel]].iter().sum::<f64>() / out[channel] as f64;
                    let response = norms[n * out[channel] + c] / (mean + eps);
                    let weight = tensor(Some(*weight), c, 0.0);
                    y[at] = x[at] + weight * x[at] * response + tensor(Some(*bias), c, 0.0);
                });
            }
            Op::Upsample { scale } => {
                let from = from.unwrap();
                each(out, |[n, c, oy, ox], at| {
                    y[at] = x[((n * from[1] + c) * from[2] + oy / scale[0]) * from[3] + ox / scale[1]];
                });
            }
            Op::Pad { before, .. } => {
                let from = from.unwrap();
                each(from, |[n, c, iy, ix], at| {
                    y[((n * out[1] + c) * out[2] + before[0] + iy) * out[3] + before[1] + ix] = x[at];
                });
            }
            Op::Permute { dims } => {
                let from = from.unwrap();
                each(&wide(out), |place, at| {
                    let mut index = [0; 4];
                    dims.iter().zip(place).for_each(|(&d, p)| index[d] = p);
                    y[at] = x[from.iter().zip(index).fold(0, |at, (size, i)| at * size + i)];
                });
            }
            Op::Scale { factor, .. } => {
                // Along one dimension, counted from the last.
                let shape = &graph.tensors[*factor];
                let len: usize = shape.iter().product();
                let run: usize = shape.iter().rev().take_while(|&&d| d == 1).count();
                let run: usize = out[out.len() - run..].iter().product();
                y.iter_mut().enumerate().for_each(|(at, y)| *y = x[at] * tensor(Some(*factor), at / run % len, 1.0));
            }
            Op::Add { .. } | Op::Mul => {
                let read = |i: usize, at: usize| {
                    let (shape, values) = (&shapes[node.inputs[i]], &values[node.inputs[i]]);
                    if shape == out { values[at] } else { values[at / (out[2] * out[3])] }
                };
                for (at, y) in y.iter_mut().enumerate() {
                    let (a, b) = (read(0, at), read(1, at));
                    *y = if node.op == Op::Mul { a * b } else { a + b };
                }
            }
            Op::Cat { dim } => {
                let dim = if *dim < 0 { (dim + out.len() as i64) as usize } else { *dim as usize };
                let mut first = 0;
                for &input in &node.inputs {
                    let (len, all) =
                        (shapes[input][dim..].iter().product::<usize>(), out[dim..].iter().product::<usize>());
                    for n in 0..out[..dim].iter().product() {
                        y[n * all + first..][..len].copy_from_slice(&values[input][n * len..][..len]);
                    }
                    first += len;
                }
            }
            Op::Split { dim, sizes, part } => {
                let (from, first) = (from.unwrap(), sizes[..*part].iter().sum::<usize>());
                let dim = usize::try_from(*dim).unwrap();
                let pixels: usize = out[dim + 1..].iter().product();
                for n in 0..out[..dim].iter().product() {
                    let part = &x[(n * from[dim] + first) * pixels..][..out[dim] * pixels];
                    y[n * out[dim] * pixels..][..part.len()].copy_from_slice(part);
                }
            }
            Op::Attention { heads, scale, rotation } => {
                let channels = out[2];
                let place = |part: usize| match node.inputs[..] {
                    [all] => (all, part * channels),
                    [_, both] if part > 0 => (both, (part - 1) * channels),
                    _ => (node.inputs[part], 0),
                };
                let read = |part: usize, n: usize, t: usize, c: usize| {
                    let ((input, first), c) = (place(part), c);
                    values[input][(n * shapes[input][1] + t) * shapes[input][2] + first + c]
                };
                let (depth, keys) = (channels / heads, shapes[place(1).0][1]);
                let turned = |part: usize, n: usize, t: usize, c: usize| match rotation {
                    Some(turn) if t >= turn.first => {
                        let (head, c) = (c / depth * depth, c % depth);
                        let rows = graph.tensors[turn.table][1];
                        let table = |i: usize| tensor(Some(turn.table), (i * rows + t - turn.first) * depth + c, 0.0);
                        let partner = read(part, n, t, head + turn.partner(c, depth));
                        read(part, n, t, head + c) * table(0) + partner * table(1)
                    }
                    _ => read(part, n, t, c),
                };
                each(&wide(out), |[n, query, c, _], at| {
                    let head = c / depth * depth;
                    let score = |key: usize| -> f64 {
                        (head..head + depth).map(|c| turned(0, n, query, c) * turned(1, n, key, c)).sum::<f64>() * scale
                    };
                    let scores: Vec<f64> = (0..keys).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                    let sum: f64 = powers.iter().sum();
                    y[at] = powers.iter().enumerate().map(|(key, p)| p * read(2, n, key, c)).sum::<f64>() / sum;
                });
            }
            Op::WindowAttention(windows) => window_attention(windows, tensors, x, from.unwrap(), &mut y),
            Op::PatchMerging => {
                let from = from.unwrap();
                each(out, |[n, oy, ox, c], at| {
                    let (part, channel) = (c / from[3], c % from[3]);
                    let (iy, ix) = (2 * oy + part % 2, 2 * ox + part / 2);
                    let inside = iy < from[1] && ix < from[2];
                    y[at] = if inside { x[((n * from[1] + iy) * from[2] + ix) * from[3] + channel] } else { 0.0 };
                });
            }
            Op::Expand { tensor: t } => {
                let len = y.len() / out[0];
                y.iter_mut().enumerate().for_each(|(at, y)| *y = tensor(Some(*t), at % len, 0.0));
            }
            Op::Shift { summand } => {
                // Of the last dimensions, or of each last one but those of size 1.
                let shape = &graph.tensors[*summand];
                let len: usize = shape.iter().product();
                let ones: usize = shape.iter().rev().take_while(|&&d| d == 1).count();
                let run: usize = if len == 1 { 1 } else { out[out.len() - ones..].iter().product() };
                y.iter_mut().enumerate().for_each(|(at, y)| *y = x[at] + tensor(Some(*summand), at / run % len, 0.0));
            }
            Op::ChannelShuffle { groups } => {
                let each_group = out[1] / groups;
                each(out, |[n, c, oy, ox], at| {
                    let from = c % groups * each_group + c / groups;
                    y[at] = x[((n * out[1] + from) * out[2] + oy) * out[3] + ox];
                });
            }
            Op::Dropout { .. } | Op::StochasticDepth { .. } | Op::Flatten { .. } | Op::Reshape { .. } => {
                y.copy_from_slice(x);
            }
        }
        values.push(y);
    }
    values.swap_remove(graph.output)
}

/// Everything by the pixel: which window it is in, who else is, and what they say.
fn window_attention(windows: &Windows, tensors: &[Vec<f32>], x: &[f64], from: &[usize], y: &mut [f64]) {
    let &Windows { heads, window, grid, .. } = windows;
    let (size, channels) = ([from[1], from[2]], from[3] / 3);
    let (padded, shift) = (windows.padded(size), windows.shifted(size));
    let depth = channels / heads;
    let fill = |c: usize| windows.fill.map_or(0.0, |t| f64::from(tensors[t][c]));
    let read = |n: usize, [py, px]: Pair, c: usize| match py < size[0] && px < size[1] {
        true => x[((n * size[0] + py) * size[1] + px) * from[3] + c],
        false => fill(c),
    };
    // Where a pixel is after the roll, its window, its place in it, and which side of the seam it is on.
    let places = |pixel: Pair| {
        [0, 1].map(|i| {
            let at = (pixel[i] + padded[i] - shift[i]) % padded[i];
            let all = padded[i] / window[i];
            let (number, token) = if grid { (at % all, at / all) } else { (at / window[i], at % window[i]) };
            (number, token, usize::from(shift[i] > 0 && at >= padded[i] - shift[i]))
        })
    };
    let bias = |head: usize, [ty, tx]: Pair| match windows.bias {
        Bias::Table(table) => f64::from(tensors[table][(ty * (2 * window[1] - 1) + tx) * heads + head]),
        Bias::Computed { distances, hidden, hidden_bias, output } => {
            let at = (ty * (2 * window[1] - 1) + tx) * 2;
            let number = |tensor: usize, at: usize| f64::from(tensors[tensor][at]);
            let all = tensors[hidden_bias].len();
            let sum: f64 = (0..all)
                .map(|h| {
                    let sum: f64 = (0..2).map(|i| number(hidden, 2 * h + i) * number(distances, at + i)).sum();
                    (sum + number(hidden_bias, h)).max(0.0) * number(output, head * all + h)
                })
                .sum();
            16.0 / (1.0 + (-sum).exp())
        }
    };
    let product = |n: usize, [a, b]: [(Pair, usize); 2]| -> f64 {
        (0..depth).map(|c| read(n, a.0, a.1 + c) * read(n, b.0, b.1 + c)).sum()
    };
    let others: Vec<Pair> = (0..padded[0] * padded[1]).map(|at| [at / padded[1], at % padded[1]]).collect();
    each(&[from[0], size[0], size[1], channels], |[n, oy, ox, c], at| {
        let (head, query) = (c / depth, [oy, ox]);
        let mine = places(query);
        let (mut total, mut sum) = (0.0, 0.0);
        for &key in &others {
            let theirs = places(key);
            if (0..2).any(|i| mine[i].0 != theirs[i].0) {
                continue;
            }
            let (q, k) = ((query, head * depth), (key, channels + head * depth));
            let mut score = match windows.scores {
                Scores::Scaled(scale) => product(n, [q, k]) * scale,
                Scores::Cosine { logit } => {
                    let length = |one| product(n, [one, one]).sqrt().max(1e-12);
                    let factor = f64::from(tensors[logit][head]).min(100f64.ln()).exp();
                    product(n, [q, k]) / length(q) / length(k) * factor
                }
            };
            score += bias(head, [0, 1].map(|i| mine[i].1 + window[i] - 1 - theirs[i].1));
            if (0..2).any(|i| mine[i].2 != theirs[i].2) {
                score += APART;
            }
            let power = score.exp();
            total += power;
            sum += power * read(n, key, 2 * channels + c);
        }
        y[at] = sum / total;
    });
}

/// Four dimensions.
fn wide(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().chain(std::iter::repeat(1)).take(4).collect()
}

fn each(shape: &[usize], mut f: impl FnMut([usize; 4], usize)) {
    let [n, c, h, w] = shape.try_into().unwrap();
    for at in 0..n * c * h * w {
        f([at / (c * h * w), at / (h * w) % c, at / w % h, at % w], at);
    }
}

fn taps(o: Pair, k: Pair, s: Pair, p: Pair, d: Pair, size: Pair) -> impl Iterator<Item = Pair> {
    let place = move |i: usize, tap: usize| (o[i] * s[i] + tap * d[i]).checked_sub(p[i]).filter(|&x| x < size[i]);
    (0..k[0] * k[1]).filter_map(move |t| Some([place(0, t / k[1])?, place(1, t % k[1])?]))
}

fn activation(function: Activation, x: f64) -> f64 {
    match function {
        Activation::Relu => x.max(0.0),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::LeakyRelu { negative_slope } => {
            if x > 0.0 {
                x
            } else {
                negative_slope * x
            }
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Hardswish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Hardsigmoid => (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Gelu { tanh: true } => unimplemented!("see activate.rs"),
        Activation::Gelu { tanh: false } => x * 0.5 * (1.0 + exact_erf(x / 2f64.sqrt())),
    }
}
