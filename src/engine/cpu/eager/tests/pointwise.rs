//! 1 x 1 convolutions with and without all that they take along.

use super::*;

const ACTIVATIONS: [Activate; 5] =
    [Activate::Nothing, Activate::Relu, Activate::Relu6, Activate::Hardswish, Activate::Silu];

fn norm(channels: usize, activation: Activate, seed: u32) -> Norm {
    let some = |seed: u32| numbers(channels, seed);
    let scale = some(seed).iter().map(|x| 3.0 * x).collect();
    Norm { mean: some(seed + 1), scale, shift: some(seed + 2), activation }
}

/// x - mean, z, and act(z) with its slope.
fn applied(norm: &Norm, x: f32, c: usize) -> (f64, f64, (f64, f64)) {
    let x = f64::from(x) - f64::from(norm.mean[c]);
    let z = x * f64::from(norm.scale[c]) + f64::from(norm.shift[c]);
    (x, z, activation(norm.activation, z))
}

struct Case {
    conv: Pointwise,
    x: Vec<f32>,
    w: Vec<f32>,
    norm: Option<Norm>,
    d: Vec<f32>,
    late: Option<(Vec<f32>, Norm, bool)>,
}

#[derive(Default)]
struct Expected {
    y: Vec<f64>,
    mean: Vec<f64>,
    var: Vec<f64>,
    dx: Vec<f64>,
    plain: Vec<f64>,
    product: Vec<f64>,
    dw: Vec<f64>,
}

impl Case {
    fn new([pixels, inputs, outputs]: [usize; 3], norms: Option<Activate>, late: Option<(Activate, bool)>) -> Self {
        let outs = pixels * outputs;
        Self {
            conv: Pointwise { pixels, inputs, outputs },
            x: numbers(pixels * inputs, 1),
            w: numbers(inputs * outputs, 2),
            norm: norms.map(|activation| norm(inputs, activation, 3)),
            d: numbers(outs, 6),
            late: late.map(|(function, training)| (numbers(outs, 7), norm(outputs, function, 8), training)),
        }
    }

    fn values(&self) -> Values<'_> {
        Values { x: &self.x, norm: self.norm.as_ref(), open: None }
    }

    fn late(&self) -> Option<Late<'_>> {
        let (x, norm, training) = self.late.as_ref()?;
        let some = |seed| if *training { numbers(self.conv.outputs, seed) } else { Vec::new() };
        Some(Late { x, norm: norm.clone(), along: some(11), level: some(12), training: *training })
    }

    fn expected(&self) -> Expected {
        let Pointwise { pixels, inputs, outputs } = self.conv;
        let mut e = Expected {
            y: vec![0.0; pixels * outputs],
            dx: vec![0.0; pixels * inputs],
            plain: vec![0.0; inputs],
            product: vec![0.0; inputs],
            dw: vec![0.0; inputs * outputs],
            ..Expected::default()
        };
        let late = self.late();
        for p in 0..pixels {
            let g = |n: usize| {
                let d = f64::from(self.d[p * outputs + n]);
                let Some(late) = &late else { return d };
                let (x, _, (_, slope)) = applied(&late.norm, late.x[p * outputs + n], n);
                let [along, level] =
                    if late.training { [f64::from(late.along[n]), f64::from(late.level[n])] } else { [0.0, 0.0] };
                (d * slope - level) * f64::from(late.norm.scale[n]) + x * along
            };
            let g: Vec<f64> = (0..outputs).map(g).collect();
            for k in 0..inputs {
                let x = self.x[p * inputs + k];
                let of = |norm| applied(norm, x, k);
                let (x, _, (a, slope)) = self.norm.as_ref().map_or((0.0, 0.0, (f64::from(x), 1.0)), of);
                let mut da = 0.0;
                for (n, g) in g.iter().enumerate() {
                    let w = f64::from(self.w[n * inputs + k]);
                    e.y[p * outputs + n] += a * w;
                    e.dw[n * inputs + k] += a * g;
                    da += g * w;
                }
                e.dx[p * inputs + k] = da * slope;
                e.plain[k] += da * slope;
                e.product[k] += da * slope * x;
            }
        }
        let n = pixels as f64;
        let all = |c: usize| e.y[c..].iter().step_by(outputs);
        e.mean = (0..outputs).map(|c| all(c).sum::<f64>() / n).collect();
        e.var = (0..outputs).map(|c| all(c).map(|y| (y - e.mean[c]).powi(2)).sum::<f64>() / n).collect();
        e
    }

    fn check(&self, workspace: &mut Workspace) {
        let (conv, e) = (self.conv, self.expected());
        let what = format!("{conv:?} with {:?} on {:?}", self.norm.as_ref().map(|n| n.activation), workspace.isa);
        let what = format!("{what}, late: {:?}", self.late.as_ref().map(|l| (l.1.activation, l.2)));
        assert!(conv.is_known(), "{what}");
        // Sums of up to 2^10 products of either sign; slopes of activations jump where z does.
        let close =
            |got: &[f32], expected: &[f64], which| assert_close(got, expected, 1e-5, &format!("{which} of {what}"));
        let narrow = |sums: &[f64]| sums.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let mut y = vec![f32::NAN; e.y.len()];
        conv.run(self.values(), &self.w, &mut y, None, workspace).unwrap();
        close(&y, &e.y, "y");
        let (mut again, mut moments) = (vec![f32::NAN; e.y.len()], Moments::default());
        conv.run(self.values(), &self.w, &mut again, Some(&mut moments), workspace).unwrap();
        assert_eq!(again, y, "{what}");
        close(&moments.mean, &e.mean, "mean");
        close(&moments.var, &e.var, "variance");
        let late = self.late();
        let derivative = || Derivative { d: &self.d, late: late.as_ref() };
        let mut first: Option<(Vec<f32>, Vec<f32>, Sums)> = None;
        for (with_dx, with_sums, with_dw) in
            [(true, true, true), (true, true, true), (true, false, false), (false, false, true), (true, true, false)]
        {
            let with_sums = with_sums && self.norm.is_some();
            let (mut dx, mut dw, mut sums) = (vec![f32::NAN; e.dx.len()], vec![f32::NAN; e.dw.len()], Sums::default());
            conv.differentiate(
                self.values(),
                &self.w,
                derivative(),
                Gradients {
                    dx: with_dx.then_some(dx.as_mut_slice()),
                    sums: with_sums.then_some(&mut sums),
                    open: None,
                    weight: with_dw.then_some(dw.as_mut_slice()),
                },
                workspace,
            )
            .unwrap();
            if with_dx {
                close(&dx, &e.dx, "dx");
            }
            if with_dw {
                close(&dw, &e.dw, "dw");
            }
            if with_sums {
                close(&narrow(&sums.plain), &e.plain, "sums");
                close(&narrow(&sums.product), &e.product, "sums of products");
            }
            if with_dx && with_dw {
                if let Some(first) = &first {
                    assert_eq!((&first.0, &first.1), (&dx, &dw), "the same bits, whoever computes which part: {what}");
                    assert_eq!((&first.2.plain, &first.2.product), (&sums.plain, &sums.product), "{what}");
                }
                first = Some((dx, dw, sums));
            }
        }
    }
}

#[test]
fn convolutions_and_their_gradients() {
    // Channels of whole blocks and of none, one pixel and several parts; more inputs than are added up at a time.
    let sizes = [
        [1, 16, 16],
        [7, 17, 33],
        [7, 40, 24],
        [500, 16, 16],
        [300, 24, 72],
        [200, 33, 17],
        [130, 72, 40],
        [40, 280, 48],
        [30, 16, 300],
    ];
    for mut workspace in workspaces() {
        for (i, size) in sizes.into_iter().enumerate() {
            let [one, other] = [i, i + 2].map(|i| ACTIVATIONS[i % ACTIVATIONS.len()]);
            Case::new(size, None, None).check(&mut workspace);
            Case::new(size, Some(one), Some((other, true))).check(&mut workspace);
        }
        for activation in ACTIVATIONS {
            Case::new([90, 24, 40], Some(activation), None).check(&mut workspace);
            Case::new([90, 24, 40], None, Some((activation, true))).check(&mut workspace);
            Case::new([90, 40, 24], Some(activation), Some((activation, false))).check(&mut workspace);
        }
    }
}

#[test]
fn nothing_beyond_and_nan_stays() {
    for mut workspace in workspaces() {
        let mut case = Case::new([50, 24, 17], Some(Activate::Relu), None);
        case.x[5 * 24 + 3] = f32::NAN;
        let mut y = vec![0.0; 50 * 17];
        case.conv.run(case.values(), &case.w, &mut y, None, &mut workspace).unwrap();
        let rows: Vec<bool> = y.chunks(17).map(|row| row.iter().all(|y| y.is_nan())).collect();
        assert!(rows.iter().enumerate().all(|(row, &nan)| nan == (row == 5)), "{:?}", workspace.isa);
        // Given statistics do not make a derivative depend on x.
        let mut case = Case::new([50, 24, 17], None, Some((Activate::Nothing, false)));
        if let Some((x, ..)) = &mut case.late {
            x[7] = f32::INFINITY;
        }
        let (late, mut dx) = (case.late(), vec![f32::NAN; 50 * 24]);
        let derivative = Derivative { d: &case.d, late: late.as_ref() };
        let to = Gradients { dx: Some(&mut dx), ..Gradients::default() };
        case.conv.differentiate(case.values(), &case.w, derivative, to, &mut workspace).unwrap();
        assert!(dx.iter().all(|dx| dx.is_finite()), "{:?}", workspace.isa);
    }
}
