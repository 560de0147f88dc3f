//! Features of a batch: forward without gradients, result in CPU memory.

use tch::{Device, Kind, Tensor};

use super::forward;
use crate::engine::{Dtype, Extract, Rows};
use crate::error::{Error, Result};
use crate::model::Graph;

/// A frozen graph.
pub struct TorchExtractor {
    pub graph: Graph,
    pub tensors: Vec<Tensor>,
    /// The type to keep features in, the model's own if None.
    pub dtype: Option<Dtype>,
}

impl Extract for TorchExtractor {
    type Inputs = Tensor;
    type Rows = HostRows;

    fn features(&mut self, inputs: Tensor) -> Result<HostRows> {
        let _guard = tch::no_grad_guard();
        HostRows::new(&forward(&self.graph, &self.tensors, inputs)?, self.dtype)
    }
}

/// A contiguous tensor in CPU memory.
pub struct HostRows {
    tensor: Tensor,
    dtype: Dtype,
}

impl HostRows {
    /// # Errors
    /// `Argument` for element types that features cannot have, and for values that `dtype` cannot hold; libtorch's own
    /// when the copy fails.
    pub fn new(features: &Tensor, dtype: Option<Dtype>) -> Result<Self> {
        let found = match features.kind() {
            Kind::BFloat16 => Dtype::BFloat16,
            Kind::Half => Dtype::Float16,
            Kind::Float => Dtype::Float32,
            Kind::Double => Dtype::Float64,
            other => {
                return Err(Error::Argument(format!(
                    "features must be float16, bfloat16, float32 or float64, got {other:?}"
                )));
            }
        };
        let dtype = dtype.unwrap_or(found);
        let kind = match dtype {
            Dtype::BFloat16 => Kind::BFloat16,
            Dtype::Float16 => Kind::Half,
            Dtype::Float32 => Kind::Float,
            Dtype::Float64 => Kind::Double,
        };
        let _guard = tch::no_grad_guard();
        let kept = features.f_detach()?.f_to_kind(kind)?;
        if dtype == Dtype::Float16 && found != dtype && bool::try_from(kept.f_isinf()?.f_any()?)? {
            return Err(Error::Argument(
                "a feature is larger than float16 can hold (65504): use dtype=\"bfloat16\" or \"float32\"".to_owned(),
            ));
        }
        Ok(Self { tensor: kept.f_to_device(Device::Cpu)?.f_contiguous()?, dtype })
    }
}

impl Rows for HostRows {
    fn shape(&self) -> Vec<usize> {
        self.tensor.size().into_iter().map(|d| usize::try_from(d).unwrap_or_default()).collect()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> &[u8] {
        let length = self.tensor.numel() * self.dtype.bytes();
        if length == 0 {
            return &[];
        }
        // SAFETY: `new` made a contiguous CPU tensor of this element type; it lives as long as the slice.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast::<u8>(), length) }
    }
}
