//! Values of the graph's nodes, one ATen call per node.

use tch::Tensor;

use super::failure::{Failure, Result};
use crate::error::Error;
use crate::model::{Activation, Dim, Graph, Node, Op};

/// The output of `graph` for one batch.
///
/// # Errors
/// libtorch's own message behind the name of the layer.
pub fn forward(graph: &Graph, tensors: &[Tensor], input: Tensor) -> Result<Tensor> {
    let last_use = last_uses(graph);
    let mut values: Vec<Option<Tensor>> = Vec::with_capacity(graph.nodes.len());
    let mut input = Some(input);
    for (index, node) in graph.nodes.iter().enumerate() {
        let value = match node.op {
            Op::Input => input.take().ok_or_else(|| Error::internal("a graph has one input"))?,
            _ => apply(node, tensors, &values).map_err(|error| name(node, error))?,
        };
        values.push(Some(value));
        // A value nobody reads any more is freed now, as a Python local would be.
        for &used in &node.inputs {
            if last_use[used] == index && used != graph.output {
                values[used] = None;
            }
        }
    }
    values[graph.output].take().ok_or_else(|| Error::internal("the graph has no output").into())
}

fn name(node: &Node, failure: Failure) -> Failure {
    match failure.0 {
        Error::Torch(text) => Error::Torch(format!("{} ({}): {text}", node.name, node.op.kind())),
        other => other,
    }
    .into()
}

fn last_uses(graph: &Graph) -> Vec<usize> {
    let mut last = vec![0; graph.nodes.len()];
    for (index, node) in graph.nodes.iter().enumerate() {
        for &input in &node.inputs {
            last[input] = index;
        }
        if let Op::Reshape { dims } = &node.op {
            for dim in dims {
                if let Dim::SizeOf { node, .. } = dim {
                    last[*node] = index;
                }
            }
        }
    }
    last
}

fn long(pair: &[usize; 2]) -> [i64; 2] {
    pair.map(|v| v as i64)
}

fn apply(node: &Node, tensors: &[Tensor], values: &[Option<Tensor>]) -> Result<Tensor> {
    let value = |n: usize| -> Result<&Tensor> {
        values
            .get(n)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::internal(format_args!("{}: input is gone", node.name)).into())
    };
    let input = |i: usize| -> Result<&Tensor> {
        value(*node.inputs.get(i).ok_or_else(|| Error::internal(format_args!("{}: input is missing", node.name)))?)
    };
    let x = input(0)?;
    Ok(match &node.op {
        Op::Input => x.shallow_clone(),
        Op::Conv2d { weight, bias, stride, padding, dilation, groups } => x.f_conv2d(
            &tensors[*weight],
            bias.map(|b| &tensors[b]),
            long(stride),
            long(padding),
            long(dilation),
            *groups as i64,
        )?,
        Op::BatchNorm2d { .. } => batch_norm(x, &node.op, tensors)?,
        Op::Activation { function, inplace } => activation(x, *function, *inplace)?,
        Op::MaxPool2d { kernel, stride, padding, dilation, ceil_mode } => {
            x.f_max_pool2d(long(kernel), long(stride), long(padding), long(dilation), *ceil_mode)?
        }
        Op::AvgPool2d { kernel, stride, padding, ceil_mode, count_include_pad, divisor } => x.f_avg_pool2d(
            long(kernel),
            long(stride),
            long(padding),
            *ceil_mode,
            *count_include_pad,
            divisor.map(|d| d as i64),
        )?,
        Op::AdaptiveAvgPool2d { output } => {
            let size = x.size();
            let side = |i: usize| output[i].map_or_else(|| size[size.len() - 2 + i], |s| s as i64);
            x.f_adaptive_avg_pool2d([side(0), side(1)])?
        }
        Op::Dropout { p, training, channels, inplace } => {
            let mut x = x.shallow_clone();
            match (channels, inplace) {
                (false, false) => x.f_dropout(*p, *training)?,
                (false, true) => x.f_dropout_(*p, *training)?,
                (true, false) => x.f_feature_dropout(*p, *training)?,
                (true, true) => x.f_feature_dropout_(*p, *training)?,
            }
        }
        Op::StochasticDepth { keep: Some(keep), .. } => {
            let mut size = vec![1; x.dim()];
            size[0] = x.size()[0];
            let samples = Tensor::f_rand(size.as_slice(), (x.kind(), x.device()))?;
            x.f_div_scalar(*keep)?.f_mul(&samples.f_add_scalar(*keep)?.f_floor()?)?
        }
        Op::StochasticDepth { p, rows, keep: None } => {
            // As torchvision draws.
            let mut size = vec![1; x.dim()];
            if *rows {
                size[0] = x.size()[0];
            }
            let noise = Tensor::f_empty(size.as_slice(), (x.kind(), x.device()))?.f_bernoulli_float_(1.0 - p)?;
            x.f_mul(&if *p < 1.0 { noise.f_div_scalar(1.0 - p)? } else { noise })?
        }
        Op::Flatten { start, end } => x.f_flatten(*start, *end)?,
        Op::Reshape { dims } => {
            let mut shape = Vec::with_capacity(dims.len());
            for dim in dims {
                shape.push(match dim {
                    Dim::Fixed(size) => *size as i64,
                    Dim::Infer => -1,
                    Dim::SizeOf { node, dim } => *value(*node)?.size().get(*dim).unwrap_or(&-1),
                });
            }
            x.f_reshape(shape)?
        }
        Op::Linear { weight, bias } => x.f_linear(&tensors[*weight], bias.map(|b| &tensors[b]))?,
        Op::LayerNorm { shape, weight, bias, eps } => {
            let shape: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
            let [weight, bias] = [weight, bias].map(|t| t.map(|t| &tensors[t]));
            x.f_layer_norm(shape, weight, bias, *eps, true)?
        }
        // F.pad counts from the last dimension.
        Op::Pad { before: [top, left], after: [bottom, right] } => {
            x.f_constant_pad_nd([left, right, top, bottom].map(|&v| v as i64))?
        }
        Op::Permute { dims } => x.f_permute(dims.iter().map(|&d| d as i64).collect::<Vec<_>>())?,
        Op::Scale { factor, first: true } => tensors[*factor].f_mul(x)?,
        Op::Scale { factor, first: false } => x.f_mul(&tensors[*factor])?,
        Op::Softmax { dim, log: true } => x.f_log_softmax(*dim, None)?,
        Op::Softmax { dim, log: false } => x.f_softmax(*dim, None)?,
        Op::Mean { dims, keepdim } => x.f_mean_dim(dims.as_slice(), *keepdim, None)?,
        Op::Add { inplace: false } => x.f_add(input(1)?)?,
        Op::Add { inplace: true } => x.shallow_clone().f_add_(input(1)?)?,
        Op::Mul => x.f_mul(input(1)?)?,
        Op::Cat { dim } => {
            let all = (0..node.inputs.len()).map(input).collect::<Result<Vec<_>>>()?;
            Tensor::f_cat(&all, *dim)?
        }
        Op::Split { dim, sizes, part } => {
            let before: usize = sizes[..*part].iter().sum();
            x.f_narrow(*dim, before as i64, sizes[*part] as i64)?
        }
        // Only graphs for features on engine `cpu` have them.
        Op::Attention { .. }
        | Op::WindowAttention(_)
        | Op::PatchMerging
        | Op::Expand { .. }
        | Op::Shift { .. }
        | Op::GroupNorm { .. }
        | Op::ResponseNorm { .. }
        | Op::Upsample { .. } => {
            return Err(Error::internal("engine torch gets no tokens").into());
        }
        Op::ChannelShuffle { groups } => {
            let (size, groups) = (x.size(), *groups as i64);
            // As torchvision's networks; the result lies in memory as theirs does.
            let apart = [&[size[0], groups, size[1] / groups], &size[2..]].concat();
            x.f_reshape(apart)?.f_transpose(1, 2)?.f_contiguous()?.f_reshape(size)?
        }
    })
}

fn batch_norm(x: &Tensor, op: &Op, tensors: &[Tensor]) -> Result<Tensor> {
    let Op::BatchNorm2d { weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, training } = op
    else {
        return Err(Error::internal("not a batch norm").into());
    };
    let at = |t: &Option<usize>| t.map(|t| &tensors[t]);
    let mut momentum = *momentum;
    if let (true, Some(batches)) = (*training, at(num_batches_tracked)) {
        let batches = &mut batches.shallow_clone();
        let _ = tch::no_grad(|| batches.f_add_scalar_(1))?;
        if momentum.is_none() {
            momentum = Some(1.0 / batches.f_double_value(&[])?);
        }
    }
    // Without running statistics the batch's own are used in either mode, as nn.BatchNorm2d does.
    let batch_statistics = *training || running_mean.is_none();
    let (mean, var) = (at(running_mean), at(running_var));
    Ok(x.f_batch_norm(at(weight), at(bias), mean, var, batch_statistics, momentum.unwrap_or(0.0), *eps, true)?)
}

fn activation(x: &Tensor, function: Activation, inplace: bool) -> Result<Tensor> {
    let mut x = x.shallow_clone();
    Ok(match (function, inplace) {
        (Activation::Relu, false) => x.f_relu()?,
        (Activation::Relu, true) => x.f_relu_()?,
        (Activation::Relu6, false) => x.f_relu6()?,
        (Activation::Relu6, true) => x.f_relu6_()?,
        // tch's leaky_relu has no slope. Its derivative has one, and is the same kernel: x > 0 ? grad : grad * slope, here
        // with x itself as the gradient. What autograd derives from it is leaky_relu's own derivative.
        (Activation::LeakyRelu { negative_slope }, _) => {
            x.f_detach()?.f_leaky_relu_backward(&x, negative_slope, false)?
        }
        (Activation::Silu, false) => x.f_silu()?,
        (Activation::Silu, true) => x.f_silu_()?,
        (Activation::Gelu { tanh }, _) => x.f_gelu(if tanh { "tanh" } else { "none" })?,
        (Activation::Hardswish, false) => x.f_hardswish()?,
        (Activation::Hardswish, true) => x.f_hardswish_()?,
        (Activation::Hardsigmoid, false) => x.f_hardsigmoid()?,
        (Activation::Hardsigmoid, true) => x.f_hardsigmoid_()?,
        (Activation::Sigmoid, _) => x.f_sigmoid()?,
        (Activation::Tanh, _) => x.f_tanh()?,
    })
}
