//! What an optimizer has for one parameter, `P`; its state lies in tensors, `T`.

use pyo3::prelude::*;

use super::record::record;
use crate::engine::optimizer::{Adam, Sgd};

pub struct SgdRow<P, T> {
    pub parameter: P,
    /// The buffer, and whether it has been used.
    pub momentum: Option<(T, bool)>,
    pub options: Sgd,
}

impl<'py, P: FromPyObject<'py>, T: FromPyObject<'py>> FromPyObject<'py> for SgdRow<P, T> {
    fn extract_bound(row: &Bound<'py, PyAny>) -> PyResult<Self> {
        record("a row of SGD", row, |r| {
            let (buffer, used): (Option<T>, bool) = (r.get("momentum_buffer")?, r.get("used")?);
            let options = Sgd {
                lr: r.get("lr")?,
                momentum: r.get("momentum")?,
                dampening: r.get("dampening")?,
                weight_decay: r.get("weight_decay")?,
                nesterov: r.get("nesterov")?,
                maximize: r.get("maximize")?,
            };
            Ok(Self { parameter: r.get("parameter")?, momentum: buffer.map(|buffer| (buffer, used)), options })
        })
    }
}

pub struct AdamRow<P, T> {
    pub parameter: P,
    pub step: T,
    pub exp_avg: T,
    pub exp_avg_sq: T,
    /// With `amsgrad`.
    pub max_exp_avg_sq: Option<T>,
    pub options: Adam,
}

impl<'py, P: FromPyObject<'py>, T: FromPyObject<'py>> FromPyObject<'py> for AdamRow<P, T> {
    fn extract_bound(row: &Bound<'py, PyAny>) -> PyResult<Self> {
        record("a row of Adam", row, |r| {
            let options = Adam {
                lr: r.get("lr")?,
                betas: (r.get("beta1")?, r.get("beta2")?),
                eps: r.get("eps")?,
                weight_decay: r.get("weight_decay")?,
                maximize: r.get("maximize")?,
                decoupled: r.get("decoupled")?,
            };
            Ok(Self {
                parameter: r.get("parameter")?,
                step: r.get("step")?,
                exp_avg: r.get("exp_avg")?,
                exp_avg_sq: r.get("exp_avg_sq")?,
                max_exp_avg_sq: r.get("max_exp_avg_sq")?,
                options,
            })
        })
    }
}
