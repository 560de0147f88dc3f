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
}

impl Extract for TorchExtractor {
    type Inputs = Tensor;
    type Rows = HostRows;

    fn features(&mut self, inputs: Tensor) -> Result<HostRows> {
        let _guard = tch::no_grad_guard();
        HostRows::new(&forward(&self.graph, &self.tensors, inputs)?)
    }
}

/// A contiguous tensor in CPU memory.
pub struct HostRows {
    tensor: Tensor,
    dtype: Dtype,
}

impl HostRows {
    /// # Errors
    /// `Argument` for element types that features cannot have; libtorch's own when the copy fails.
    pub fn new(features: &Tensor) -> Result<Self> {
        let dtype = match features.kind() {
            Kind::Half => Dtype::Float16,
            Kind::Float => Dtype::Float32,
            Kind::Double => Dtype::Float64,
            other => {
                return Err(Error::Argument(format!("features must be float16, float32 or float64, got {other:?}")));
            }
        };
        let _guard = tch::no_grad_guard();
        Ok(Self { tensor: features.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?, dtype })
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
