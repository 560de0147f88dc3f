//! The only place where tensors cross: checked views of their memory, for any torch, without its C++ interface.

use std::ops::Range;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::GILOnceCell;
use pyo3::types::{IntoPyDict, PyCapsule, PyType};

use super::dlpack::{self, Array, Kind};
use crate::data::Batch;
use crate::error::{Error, Result};

/// A dense tensor of whatever type on whatever device, kept alive; its memory is looked at through checks.
///
/// Dropping the last view of a tensor takes the GIL: never under a lock that somebody with the GIL waits for.
pub struct Tensor {
    object: Py<PyAny>,
    array: Array,
    kind: Kind,
    shape: Vec<usize>,
    contiguous: bool,
}

impl<'py> FromPyObject<'py> for Tensor {
    /// Raises `TypeError` for what is no tensor, and torch's own error for tensors without memory of their own (sparse,
    /// fake, meta).
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if !object.is_instance(torch_type(py)?)? {
            return Err(PyTypeError::new_err(format!("expected a torch.Tensor, got {}", object.get_type().name()?)));
        }
        // The bits of such views say something else than their memory.
        if object.call_method0("is_neg")?.is_truthy()? || object.call_method0("is_conj")?.is_truthy()? {
            return Err(PyValueError::new_err(
                "the tensor is a lazily negated or conjugated view: call .resolve_neg().resolve_conj() first",
            ));
        }
        static TO_DLPACK: GILOnceCell<Py<PyAny>> = GILOnceCell::new();
        let to_dlpack = TO_DLPACK.import(py, "torch.utils.dlpack", "to_dlpack")?;
        // A tensor of our own over that memory: the user's may be given other memory while we look, as by `model.half()`.
        // What moves the memory itself, as `share_memory_()` does, leaves this one behind too: see `has_moved`.
        let own = object.call_method0("detach")?;
        let array = Array::new(to_dlpack.call1((own,))?.downcast::<PyCapsule>()?)?;
        let shape = array.shape();
        let object = object.clone().unbind();
        Ok(Self { object, kind: array.kind(), contiguous: array.is_contiguous(&shape), shape, array })
    }
}

fn torch_type(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static TENSOR: GILOnceCell<Py<PyType>> = GILOnceCell::new();
    TENSOR.import(py, "torch", "Tensor")
}

impl Tensor {
    /// Whether the user's tensor has been given other memory since, so that this view must not be used.
    ///
    /// # Errors
    /// torch's own.
    pub fn has_moved(&self, py: Python<'_>) -> PyResult<bool> {
        let now: usize = self.object.call_method0(py, "data_ptr")?.extract(py)?;
        Ok(now != self.array.start().addr())
    }

    /// Adds to an integer tensor as torch does, wherever its memory is now.
    ///
    /// # Errors
    /// torch's own.
    pub fn add(&self, py: Python<'_>, more: i64) -> PyResult<()> {
        self.object.call_method1(py, "add_", (more,)).map(drop)
    }

    /// A view of the same tensor as it is now.
    ///
    /// # Errors
    /// As for the first one.
    pub fn again(&self, py: Python<'_>) -> PyResult<Self> {
        self.object.extract(py)
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether its elements are of `kind` and lie behind each other in CPU memory.
    pub fn is_plain(&self, kind: Kind) -> bool {
        self.array.on_cpu() && self.contiguous && self.kind == kind && self.has_memory() && self.is_aligned()
    }

    /// Not so what torch has made of a NumPy array that is not.
    fn is_aligned(&self) -> bool {
        self.kind.bytes().is_none_or(|size| self.array.start().addr().is_multiple_of(size))
    }

    /// Not so a fake tensor, which has shape, type and device only.
    fn has_memory(&self) -> bool {
        self.numel() == 0 || !self.array.start().is_null()
    }

    /// Where the elements of a contiguous tensor lie.
    pub fn addresses(&self) -> Range<usize> {
        let start = self.array.start() as usize;
        start..start + self.numel() * self.kind.bytes().unwrap_or_default()
    }

    /// What it is, for messages.
    pub fn describe(&self) -> String {
        let place = if self.array.on_cpu() { "cpu" } else { "another device" };
        let order = if self.contiguous { "" } else { ", not contiguous" };
        let memory = match (self.has_memory(), self.is_aligned()) {
            (true, true) => "",
            (true, false) => ", not aligned",
            (false, _) => ", without memory",
        };
        format!("{} of shape {:?} on {place}{order}{memory}", self.kind, self.shape)
    }

    /// The elements, where they are plain `T`.
    pub fn elements<T: Element>(&self) -> Option<&[T]> {
        if !self.is_plain(T::KIND) {
            return None;
        }
        match self.numel() {
            0 => Some(&[]),
            // SAFETY: `is_plain` checked that `len` elements of this type are there; the array keeps them alive.
            len => Some(unsafe { std::slice::from_raw_parts(self.array.start().cast(), len) }),
        }
    }

    /// The memory behind plain elements of any type.
    pub fn bytes(&self) -> Option<&[u8]> {
        let size = self.kind.bytes()?;
        if !self.is_plain(self.kind) {
            return None;
        }
        match self.numel() * size {
            0 => Some(&[]),
            // SAFETY: as in `elements`.
            len => Some(unsafe { std::slice::from_raw_parts(self.array.start(), len) }),
        }
    }

    /// Where plain elements `T` begin, for an engine that writes them.
    ///
    /// # Errors
    /// `Argument` for tensors of another type, on another device or not contiguous.
    pub fn start<T: Element>(&self) -> Result<*mut T> {
        if self.is_plain(T::KIND) {
            return Ok(self.array.start().cast());
        }
        Err(Error::Unsupported(format!(
            "the cpu engine needs contiguous {} tensors on cpu, got {}: use engine='python'",
            T::KIND,
            self.describe()
        )))
    }
}

/// Types of elements that the extension computes with.
pub trait Element: Copy {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float32;
}

impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}

/// A tensor, or a copy of it in the usual order of memory.
pub fn contiguous(object: &Bound<'_, PyAny>) -> PyResult<Tensor> {
    let tensor: Tensor = object.extract()?;
    if tensor.contiguous && tensor.is_aligned() {
        return Ok(tensor);
    }
    let py = object.py();
    let order = [("memory_format", py.import("torch")?.getattr("contiguous_format")?)].into_py_dict(py)?;
    object.call_method("clone", (), Some(&order))?.extract()
}

/// A batch as a tensor.
pub fn new(py: Python<'_>, batch: Batch) -> PyResult<Bound<'_, PyAny>> {
    static FROM_DLPACK: GILOnceCell<Py<PyAny>> = GILOnceCell::new();
    FROM_DLPACK.import(py, "torch.utils.dlpack", "from_dlpack")?.call1((dlpack::export(py, batch)?,))
}
