//! Squeeze and excitation: the mean, a convolution behind the gate, and the way back from it.

use super::*;

/// act(z), its slope, and x - mean.
fn applied(norm: &Norm, x: f32, c: usize) -> (f64, f64, f64) {
    let x = f64::from(x) - f64::from(norm.mean[c]);
    let (a, slope) = activation(norm.activation, x * f64::from(norm.scale[c]) + f64::from(norm.shift[c]));
    (a, slope, x)
}

#[test]
fn gates_and_their_gradients() {
    let activations = [Activate::Nothing, Activate::Relu, Activate::Relu6, Activate::Hardswish, Activate::Silu];
    // Several parts of an image, and images of a pixel; channels of whole blocks and of none.
    let sizes = [(2, 2100, 16), (3, 49, 24), (5, 1, 40), (2, 77, 17), (1, 130, 72)];
    for mut workspace in workspaces() {
        for (i, (images, pixels, channels)) in sizes.into_iter().enumerate() {
            for outputs in [16, 33] {
                let [mean, scale, shift] = [1, 2, 3].map(|seed| numbers(channels, seed));
                let norm = Norm { mean, scale, shift, activation: activations[i] };
                check((images, pixels, channels), outputs, &norm, &mut workspace);
            }
        }
    }
}

fn check((images, pixels, channels): (usize, usize, usize), outputs: usize, norm: &Norm, workspace: &mut Workspace) {
    let what = format!("{images} x {pixels} x {channels}, {outputs}, {:?}", workspace.isa);
    let (x, gate) = (numbers(images * pixels * channels, 4), numbers(images * channels, 5));
    let (w, d) = (numbers(outputs * channels, 6), numbers(images * pixels * outputs, 7));
    let dmean = numbers(images * channels, 8);
    let mut mean = vec![0.0f64; images * channels];
    let (mut y, mut dm) = (vec![0.0f64; d.len()], vec![0.0f64; x.len()]);
    let (mut dgate, mut dw) = (vec![0.0f64; gate.len()], vec![0.0f64; w.len()]);
    let (mut dz, mut plain, mut product) = (vec![0.0f64; x.len()], vec![0.0f64; channels], vec![0.0f64; channels]);
    for p in 0..images * pixels {
        for c in 0..channels {
            let (at, image) = (p * channels + c, p / pixels * channels + c);
            let (a, slope, centred) = applied(norm, x[at], c);
            mean[image] += a / pixels as f64;
            for n in 0..outputs {
                let (w, d) = (f64::from(w[n * channels + c]), f64::from(d[p * outputs + n]));
                y[p * outputs + n] += a * f64::from(gate[image]) * w;
                dm[at] += d * w;
                dw[n * channels + c] += d * a * f64::from(gate[image]);
            }
            dgate[image] += dm[at] * a;
            dz[at] = slope * (dm[at] * f64::from(gate[image]) + f64::from(dmean[image]) / pixels as f64);
            plain[c] += dz[at];
            product[c] += dz[at] * centred;
        }
    }
    let sizes = Gate { images, pixels, channels };
    let mut got = vec![f32::NAN; mean.len()];
    sizes.squeeze(&x, norm, &mut got, workspace).unwrap();
    assert_close(&got, &mean, 1e-5, &format!("mean of {what}"));

    let conv = Pointwise { pixels: images * pixels, inputs: channels, outputs };
    let values = Values { x: &x, norm: Some(norm), open: Some(Open { factors: &gate, pixels }) };
    let mut got = vec![f32::NAN; y.len()];
    conv.run(values, &w, &mut got, None, workspace).unwrap();
    assert_close(&got, &y, 1e-5, &format!("y of {what}"));

    let (mut dx, mut to_gate, mut to_w) =
        (vec![f32::NAN; x.len()], vec![f32::NAN; gate.len()], vec![f32::NAN; w.len()]);
    let derivative = Derivative { d: &d, late: None };
    let all = Gradients { dx: Some(&mut dx), sums: None, open: Some(&mut to_gate), weight: Some(&mut to_w) };
    conv.differentiate(values, &w, derivative, all, workspace).unwrap();
    assert_close(&dx, &dm, 1e-5, &format!("dm of {what}"));
    assert_close(&to_gate, &dgate, 1e-5, &format!("gate's of {what}"));
    assert_close(&to_w, &dw, 1e-5, &format!("filters' of {what}"));
    let mut alone = vec![f32::NAN; gate.len()];
    let only = Gradients { open: Some(&mut alone), ..Gradients::default() };
    conv.differentiate(values, &w, derivative, only, workspace).unwrap();
    assert_close(&alone, &dgate, 1e-5, &format!("gate's alone of {what}"));

    let mut sums = Sums::default();
    sizes.differentiate((&x, norm), &gate, &dmean, &mut dx, &mut sums, workspace).unwrap();
    assert_close(&dx, &dz, 1e-5, &format!("dz of {what}"));
    let narrow = |sums: &[f64]| sums.iter().map(|&x| x as f32).collect::<Vec<f32>>();
    assert_close(&narrow(&sums.plain), &plain, 1e-5, &format!("sums of {what}"));
    assert_close(&narrow(&sums.product), &product, 1e-5, &format!("products of {what}"));
}
