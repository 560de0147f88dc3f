//! 3 x 3 convolutions and their gradients, by either method.

use super::*;
use crate::engine::cpu::eager::conv3x3_method::Method;

const METHODS: [Method; 2] = [Method::Winograd, Method::Direct];

#[test]
fn convolutions_and_their_gradients_by_both_methods() {
    // Winograd's tiles that end at the edge and beyond it, more than one panel, images smaller than a tile, paddings 0 to 2,
    // sums of several chunks in several runs; the last ones have too many channels for one worker to take a block of tiles through alone, and for a dU each.
    let sizes = [
        (2, [8, 8], 16, 16, 1),
        (1, [4, 4], 16, 32, 1),
        (3, [7, 9], 48, 80, 1),
        (2, [13, 11], 32, 48, 0),
        (1, [5, 6], 16, 48, 2),
        (1, [1, 1], 16, 16, 1),
        (5, [1, 1], 16, 32, 2),
        (70, [2, 2], 32, 48, 1),
        (3, [3, 1], 16, 16, 1),
        (2, [5, 5], 144, 64, 1),
        (1, [9, 6], 176, 176, 1),
        // More tiles than are transformed at a time.
        (150, [1, 1], 176, 176, 1),
    ];
    for (images, size, inputs, outputs, padding) in sizes {
        let input = Shape { images, size, channels: inputs };
        let conv = Conv3x3 { input, outputs, padding };
        let output = conv.output();
        let (x, w) = (numbers(input.floats(), 1), numbers(inputs * outputs * 9, 2));
        let (bias, dy) = (numbers(outputs, 3), numbers(output.floats(), 4));
        let mut y: Vec<f64> = (0..output.floats()).map(|at| f64::from(bias[at % outputs])).collect();
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        products(input, output, [3, 1, padding, 1], |to, from, filter| {
            y[to] += f64::from(x[from]) * f64::from(w[filter]);
            dx[from] += f64::from(dy[to]) * f64::from(w[filter]);
            dw[filter] += f64::from(dy[to]) * f64::from(x[from]);
        });
        for mut workspace in workspaces() {
            for method in METHODS {
                let what = format!("{conv:?} {method:?} on {:?} by {}", workspace.isa, workspace.threads.workers());
                let (mut got_y, mut got_dx, mut got_dw) =
                    (vec![f32::NAN; y.len()], vec![f32::NAN; x.len()], vec![f32::NAN; w.len()]);
                conv.run_by(method, &x, Filters::AsTheyAre(&w), Some(&bias), &mut got_y, &mut workspace).unwrap();
                conv.turned().run_by(method, &dy, Filters::Turned(&w), None, &mut got_dx, &mut workspace).unwrap();
                conv.weight_gradient_by(method, &x, &dy, &mut got_dw, &mut workspace).unwrap();
                // Winograd: some hundred roundings of 2^-24; the transforms multiply by up to 8, twice.
                let tolerance = if method == Method::Winograd { 2e-5 } else { 1e-6 };
                for (got, expected, which) in [(&got_y, &y, "y"), (&got_dx, &dx, "dx"), (&got_dw, &dw, "dw")] {
                    assert_close(got, expected, tolerance, &format!("{which} of {what}"));
                }
                let mut again = vec![f32::NAN; w.len()];
                conv.weight_gradient_by(method, &x, &dy, &mut again, &mut workspace).unwrap();
                assert_eq!(again, got_dw, "the same bits, whoever computes which part: {what}");
            }
        }
    }
}

#[test]
fn the_method_that_takes_less_time() {
    use Method::{Direct, Winograd};
    // As measured: images, side, channels; y and dx, dw.
    for (images, side, channels, method, weight) in [
        (32, 2, 512, Direct, Direct),
        (32, 1, 512, Direct, Direct),
        (64, 2, 64, Direct, Direct),
        (32, 4, 256, Winograd, Winograd),
        (32, 8, 128, Winograd, Winograd),
        (1, 7, 512, Direct, Direct),
        (2, 7, 512, Direct, Direct),
        (16, 4, 512, Winograd, Direct),
        (32, 7, 512, Winograd, Winograd),
        (1, 56, 64, Winograd, Winograd),
        (32, 56, 64, Winograd, Winograd),
    ] {
        let input = Shape { images, size: [side, side], channels };
        let conv = Conv3x3 { input, outputs: channels, padding: 1 };
        assert_eq!([conv.method(), conv.turned().method(), conv.weight_method()], [method, method, weight], "{conv:?}");
    }
}
