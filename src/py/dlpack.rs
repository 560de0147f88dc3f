//! Arrays in and out without a copy, through the DLPack capsule protocol (v0, which every torch reads).
//!
//! Out: a [`Batch`] becomes a capsule that `torch.from_dlpack` turns into a tensor; when the tensor dies, on whatever
//! thread, the deleter drops the batch and its buffer is back in the pool. In: a tensor's capsule becomes a [`View`].

use std::ffi::{CStr, c_void};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::{ffi, types::PyCapsule};

use crate::data::{Batch, DType};

const NAME: &CStr = c"dltensor";
const USED: &CStr = c"used_dltensor";
const CPU: i32 = 1;

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DLManagedTensor {
    tensor: DLTensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// What a capsule of ours points to: the header first, so that its address is the box's.
#[repr(C)]
struct Exported {
    header: DLManagedTensor,
    shape: Vec<i64>,
    batch: Batch,
}

unsafe extern "C" fn delete(header: *mut DLManagedTensor) {
    // SAFETY: `header` is the first field of an `Exported` that `export` leaked for exactly this call.
    drop(unsafe { Box::from_raw(header.cast::<Exported>()) });
}

unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // A capsule that was consumed has another name, and its tensor owns the memory now.
    // SAFETY: Python calls this with the capsule it destroys; the name decides whether the pointer is still ours.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// A capsule for `torch.from_dlpack`; the tensor is contiguous and writable.
pub fn export(py: Python<'_>, batch: Batch) -> PyResult<Bound<'_, PyAny>> {
    let (code, bits) = match batch.dtype {
        DType::Uint8 => (1, 8),
        DType::Float32 => (2, 32),
    };
    let shape = batch.shape.iter().map(|&n| n as i64).collect::<Vec<_>>();
    let ndim = i32::try_from(shape.len()).map_err(|_| PyValueError::new_err("too many dimensions"))?;
    let tensor = DLTensor {
        data: std::ptr::null_mut(),
        device_type: CPU,
        device_id: 0,
        ndim,
        code,
        bits,
        lanes: 1,
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let header = DLManagedTensor { tensor, manager: std::ptr::null_mut(), deleter: Some(delete) };
    let mut exported = Box::new(Exported { header, shape, batch });
    exported.header.tensor.data = exported.batch.as_mut_ptr().cast();
    exported.header.tensor.shape = exported.shape.as_mut_ptr();
    let pointer = Box::into_raw(exported);
    // SAFETY: `pointer` is valid until `delete`, which the tensor calls, or `destroy` when there was never a tensor.
    unsafe {
        let capsule = ffi::PyCapsule_New(pointer.cast(), NAME.as_ptr(), Some(destroy));
        if capsule.is_null() {
            delete(pointer.cast());
        }
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// The bytes of a contiguous uint8 tensor in CPU memory, kept alive.
pub struct View {
    managed: *mut DLManagedTensor,
    pub shape: Vec<usize>,
}

// SAFETY: the memory is only read, and the deleter of a DLPack capsule may run on any thread.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Consumes a capsule of `torch.utils.dlpack.to_dlpack`.
    pub fn new(capsule: &Bound<'_, PyCapsule>) -> PyResult<Self> {
        let raw = capsule.as_ptr();
        // SAFETY: the name says what the pointer is; renaming takes the ownership, as the protocol asks.
        let managed = unsafe {
            let managed = ffi::PyCapsule_GetPointer(raw, NAME.as_ptr()).cast::<DLManagedTensor>();
            if managed.is_null() || ffi::PyCapsule_SetName(raw, USED.as_ptr()) != 0 {
                return Err(PyErr::fetch(capsule.py()));
            }
            managed
        };
        let mut view = Self { managed, shape: Vec::new() };
        // SAFETY: valid until the deleter is called, which `Drop` does.
        let tensor = unsafe { &(*managed).tensor };
        let ndim = usize::try_from(tensor.ndim).unwrap_or_default();
        // SAFETY: `shape` has `ndim` entries, as have `strides` unless they are null (contiguous).
        let (shape, strides) = unsafe {
            let strides = (!tensor.strides.is_null()).then(|| std::slice::from_raw_parts(tensor.strides, ndim));
            (std::slice::from_raw_parts(tensor.shape, ndim), strides)
        };
        let mut contiguous = 1;
        for (i, &size) in shape.iter().enumerate().rev() {
            if size != 1 && strides.is_some_and(|strides| strides.get(i) != Some(&contiguous)) {
                return Err(PyValueError::new_err("the tensor is not contiguous: call .contiguous() first"));
            }
            contiguous *= size;
        }
        if (tensor.device_type, tensor.code, tensor.bits, tensor.lanes) != (CPU, 1, 8, 1) {
            return Err(PyValueError::new_err("a uint8 tensor in CPU memory is expected"));
        }
        view.shape = shape.iter().map(|&n| usize::try_from(n).unwrap_or_default()).collect();
        Ok(view)
    }
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        let len = self.shape.iter().product::<usize>();
        // SAFETY: `new` checked that `len` contiguous bytes of CPU memory are there; the capsule keeps them alive.
        unsafe {
            let tensor = &(*self.managed).tensor;
            if len == 0 {
                return &[];
            }
            let offset = usize::try_from(tensor.byte_offset).unwrap_or_default();
            std::slice::from_raw_parts(tensor.data.cast::<u8>().add(offset), len)
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: we took the ownership in `new`, so the deleter is ours to call, once.
        unsafe {
            if let Some(deleter) = (*self.managed).deleter {
                deleter(self.managed);
            }
        }
    }
}
