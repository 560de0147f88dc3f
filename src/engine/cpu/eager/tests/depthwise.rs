//! Depthwise convolutions with all that is computed where it is read, against the definition in float64.

use super::*;

struct Case {
    conv: Depthwise,
    /// What the values' norm and the one behind the output have for an activation, and whether the latter's statistics
    /// are the batch's own.
    norm: Option<Activate>,
    late: Option<(Activate, bool)>,
}

fn case(
    [kernel, stride, before, after]: [usize; 4],
    (images, size, channels): (usize, [usize; 2], usize),
    norm: Option<Activate>,
    late: Option<(Activate, bool)>,
) -> Case {
    let conv = depthwise_of(Shape { images, size, channels }, kernel, stride, [before, after]);
    assert!(conv.is_known());
    Case { conv, norm, late }
}

fn norm(channels: usize, activation: Activate, seed: u32) -> Norm {
    let [mean, scale, shift] = [0, 1, 2].map(|at| numbers(channels, seed + at));
    // Beyond the corners of Hardswish and ReLU6.
    let scale = scale.into_iter().map(|x| 8.0 * x).collect();
    Norm { mean, scale, shift, activation }
}

/// act(z) and its derivative, and x - mean, at a float of an image.
fn normed(norm: Option<&Norm>, x: &[f32], at: usize) -> (f64, f64, f64) {
    let Some(norm) = norm else { return (f64::from(x[at]), 1.0, 0.0) };
    let [mean, scale, shift] = [&norm.mean, &norm.scale, &norm.shift].map(|of| f64::from(of[at % of.len()]));
    let centred = f64::from(x[at]) - mean;
    let (value, slope) = activation(norm.activation, centred * scale + shift);
    (value, slope, centred)
}

struct Expected {
    y: Vec<f64>,
    mean: Vec<f64>,
    var: Vec<f64>,
    dx: Vec<f64>,
    plain: Vec<f64>,
    product: Vec<f64>,
    dw: Vec<f64>,
}

fn expected(case: &Case, values: Values<'_>, w: &[f32], derivative: Derivative<'_>) -> Expected {
    let (input, output, channels) = (case.conv.input, case.conv.output(), case.conv.input.channels);
    let a: Vec<_> = (0..input.floats()).map(|at| normed(values.norm, values.x, at)).collect();
    let g = |at: usize| {
        let d = f64::from(derivative.d[at]);
        let Some(late) = derivative.late else { return d };
        let (_, slope, centred) = normed(Some(&late.norm), late.x, at);
        let c = at % channels;
        let along = if late.training {
            centred * f64::from(late.along[c]) - f64::from(late.level[c]) * f64::from(late.norm.scale[c])
        } else {
            0.0
        };
        d * slope * f64::from(late.norm.scale[c]) + along
    };
    let g: Vec<f64> = (0..output.floats()).map(g).collect();
    let (mut y, mut dx, mut dw) = (vec![0.0; g.len()], vec![0.0; a.len()], vec![0.0; w.len()]);
    let Depthwise { kernel, stride, padding, .. } = case.conv;
    products(input, output, [kernel, stride, padding, channels], |to, from, filter| {
        y[to] += a[from].0 * f64::from(w[filter]);
        dx[from] += g[to] * f64::from(w[filter]);
        dw[filter] += g[to] * a[from].0;
    });
    let (mut plain, mut product) = (vec![0.0; channels], vec![0.0; channels]);
    for (at, dx) in dx.iter_mut().enumerate() {
        *dx *= a[at].1;
        plain[at % channels] += *dx;
        product[at % channels] += *dx * a[at].2;
    }
    let (mut mean, mut var) = (vec![0.0; channels], vec![0.0; channels]);
    let n = (y.len() / channels) as f64;
    for (at, y) in y.iter().enumerate() {
        mean[at % channels] += y / n;
    }
    for (at, y) in y.iter().enumerate() {
        var[at % channels] += (y - mean[at % channels]).powi(2) / n;
    }
    Expected { y, mean, var, dx, plain, product, dw }
}

#[test]
fn depthwise_convolutions_and_their_gradients() {
    use Activate::{Hardswish, Nothing, Relu, Relu6, Silu};
    for case in [
        // Every filter and stride; channels of no whole blocks; rows of 1 to 7 outputs and more; several bands.
        case([3, 1, 1, 1], (2, [5, 7], 16), None, None),
        case([3, 1, 1, 1], (1, [40, 12], 24), Some(Relu), Some((Relu6, true))),
        case([3, 2, 1, 1], (2, [9, 8], 24), Some(Hardswish), Some((Silu, true))),
        case([3, 2, 0, 0], (1, [30, 31], 40), Some(Silu), Some((Nothing, false))),
        case([3, 2, 2, 2], (2, [6, 5], 17), Some(Nothing), None),
        case([3, 1, 0, 0], (3, [3, 3], 48), None, Some((Hardswish, true))),
        case([5, 1, 2, 2], (2, [3, 4], 40), Some(Relu6), Some((Relu, false))),
        case([5, 1, 4, 4], (1, [9, 11], 17), None, Some((Nothing, true))),
        case([5, 2, 2, 2], (2, [33, 15], 16), Some(Hardswish), Some((Hardswish, true))),
        case([5, 2, 0, 0], (1, [11, 9], 17), Some(Silu), None),
        case([5, 2, 3, 3], (2, [4, 4], 24), None, None),
        case([7, 1, 3, 3], (1, [37, 20], 33), None, None),
        case([7, 1, 3, 3], (2, [4, 3], 24), Some(Silu), Some((Silu, true))),
        case([7, 1, 3, 3], (1, [29, 30], 40), Some(Relu), Some((Relu, true))),
        case([7, 1, 6, 6], (2, [8, 8], 20), Some(Nothing), Some((Nothing, true))),
        // More zeros behind than in front, as "same" padding has them.
        case([3, 2, 0, 1], (2, [12, 8], 24), Some(Relu6), Some((Nothing, true))),
        case([5, 2, 1, 2], (1, [10, 30], 17), Some(Silu), Some((Relu, true))),
        case([3, 1, 0, 2], (1, [5, 4], 16), None, None),
        case([7, 1, 1, 6], (1, [9, 4], 33), Some(Relu), None),
        // An image of one pixel, and zeros wider than it.
        case([3, 1, 1, 1], (2, [1, 1], 16), Some(Relu), Some((Relu, true))),
        case([5, 2, 2, 2], (3, [1, 1], 24), Some(Silu), None),
        case([7, 1, 6, 6], (1, [1, 2], 32), None, Some((Silu, true))),
        // Groups of blocks.
        case([3, 1, 1, 1], (1, [2, 2], 200), Some(Relu), Some((Relu, true))),
        case([5, 1, 2, 2], (1, [4, 300], 72), Some(Hardswish), Some((Nothing, true))),
    ] {
        check(&case);
    }
}

fn check(case: &Case) {
    let (conv, output, channels) = (case.conv, case.conv.output(), case.conv.input.channels);
    let (x, w) = (numbers(conv.input.floats(), 1), numbers(channels * conv.taps(), 2));
    let (d, behind) = (numbers(output.floats(), 3), numbers(output.floats(), 4));
    let before = case.norm.map(|activation| norm(channels, activation, 5));
    let late = case.late.map(|(activation, training)| Late {
        x: &behind,
        norm: norm(channels, activation, 10),
        along: numbers(if training { channels } else { 0 }, 20),
        level: numbers(if training { channels } else { 0 }, 21),
        training,
    });
    let (values, derivative) =
        (Values { x: &x, norm: before.as_ref(), open: None }, Derivative { d: &d, late: late.as_ref() });
    let e = expected(case, values, &w, derivative);
    for mut workspace in workspaces() {
        let what = format!(
            "of {conv:?}, {:?}, {:?} on {:?} by {}",
            case.norm,
            case.late,
            workspace.isa,
            workspace.threads.workers()
        );
        let close = |got: &[f32], expected: &[f64], which: &str| {
            // Some dozen roundings of 2^-24.
            assert_close(got, expected, 5e-6, &format!("{which} {what}"));
        };
        let close_sums = |got: &[f64], expected: &[f64], which: &str| {
            let got: Vec<f32> = got.iter().map(|&x| x as f32).collect();
            close(&got, expected, which);
        };
        let (mut y, mut moments) = (vec![f32::NAN; e.y.len()], Moments::default());
        conv.run(values, &w, &mut y, Some(&mut moments), &mut workspace).unwrap();
        close(&y, &e.y, "y");
        close(&moments.mean, &e.mean, "mean");
        close(&moments.var, &e.var, "variance");
        let mut alone = vec![f32::NAN; e.y.len()];
        conv.run(values, &w, &mut alone, None, &mut workspace).unwrap();
        assert_eq!(alone, y, "y without moments {what}");

        let (mut dx, mut dw) = (vec![f32::NAN; e.dx.len()], vec![f32::NAN; e.dw.len()]);
        let mut sums = Sums::default();
        let wanted = values.norm.map(|_| &mut sums);
        let to = Gradients { dx: Some(&mut dx), sums: wanted, open: None, weight: Some(&mut dw) };
        conv.differentiate(values, &w, derivative, to, &mut workspace).unwrap();
        close(&dx, &e.dx, "dx");
        close(&dw, &e.dw, "dw");
        if values.norm.is_some() {
            close_sums(&sums.plain, &e.plain, "sum of dz");
            close_sums(&sums.product, &e.product, "sum of dz (x - mean)");
        }
        // The same bits, whoever computes which part.
        let (mut dx2, mut dw2, mut again) = (vec![f32::NAN; dx.len()], vec![f32::NAN; dw.len()], Sums::default());
        let wanted = values.norm.map(|_| &mut again);
        let to = Gradients { dx: Some(&mut dx2), sums: wanted, open: None, weight: Some(&mut dw2) };
        conv.differentiate(values, &w, derivative, to, &mut workspace).unwrap();
        assert!(dx2 == dx && dw2 == dw, "once more {what}");
        assert_eq!((again.plain, again.product), (sums.plain, sums.product), "once more {what}");
        // Each alone may be divided otherwise.
        (dx2.fill(f32::NAN), dw2.fill(f32::NAN));
        let to = Gradients { dx: Some(&mut dx2), ..Gradients::default() };
        conv.differentiate(values, &w, derivative, to, &mut workspace).unwrap();
        let to = Gradients { weight: Some(&mut dw2), ..Gradients::default() };
        conv.differentiate(values, &w, derivative, to, &mut workspace).unwrap();
        close(&dx2, &e.dx, "dx alone");
        close(&dw2, &e.dw, "dw alone");
    }
}

#[test]
fn moments_far_from_zero() {
    // A mean of a hundred times the deviation, which is all the more at the edges of an image.
    let case = case([3, 1, 1, 1], (4, [60, 50], 24), None, None);
    let floats = case.conv.input.floats();
    let x: Vec<f32> = numbers(floats, 1).into_iter().map(|x| x + 100.0).collect();
    for (kind, w) in [("sums", vec![1.0; 24 * 9]), ("copies", [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0].repeat(24))]
    {
        let (values, derivative) = (Values { x: &x, norm: None, open: None }, Derivative { d: &x, late: None });
        let e = expected(&case, values, &w, derivative);
        for mut workspace in workspaces() {
            let (mut y, mut moments) = (vec![f32::NAN; floats], Moments::default());
            case.conv.run(values, &w, &mut y, Some(&mut moments), &mut workspace).unwrap();
            assert_close(&moments.mean, &e.mean, 1e-6, kind);
            assert_close(&moments.var, &e.var, 1e-5, kind);
        }
    }
}
