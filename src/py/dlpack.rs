//! The DLPack capsule protocol (v0, which every torch reads and writes): arrays in and out without a copy.
//!
//! Out: a [`Batch`] becomes a capsule that `torch.from_dlpack` turns into a tensor; when the tensor dies, on whatever
//! thread, the deleter drops the batch and its buffer is back in the pool. In: a tensor's capsule becomes an [`Array`].

use std::ffi::{CStr, c_void};
use std::fmt;
use std::ptr::NonNull;

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

/// # Safety
/// The header of an [`Exported`] that [`export`] leaked, and that nobody uses any more.
unsafe extern "C" fn delete(header: *mut DLManagedTensor) {
    // SAFETY: `header` is the first field of an `Exported` that `export` leaked for exactly this call.
    drop(unsafe { Box::from_raw(header.cast::<Exported>()) });
}

/// # Safety
/// For Python, with a capsule of [`export`], under the GIL.
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

/// Element types that cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Uint8,
    Int64,
    BFloat16,
    Float16,
    Float32,
    Float64,
    /// DLPack's code of the type and its bits.
    Other(u8, u8),
}

impl Kind {
    /// Bytes of one element, where known.
    pub fn bytes(self) -> Option<usize> {
        match self {
            Self::Uint8 => Some(1),
            Self::BFloat16 | Self::Float16 => Some(2),
            Self::Float32 => Some(4),
            Self::Int64 | Self::Float64 => Some(8),
            Self::Other(..) => None,
        }
    }
}

/// torch's name, where there is one.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uint8 => f.write_str("uint8"),
            Self::Int64 => f.write_str("int64"),
            Self::BFloat16 => f.write_str("bfloat16"),
            Self::Float16 => f.write_str("float16"),
            Self::Float32 => f.write_str("float32"),
            Self::Float64 => f.write_str("float64"),
            Self::Other(0, bits) => write!(f, "int{bits}"),
            Self::Other(1, bits) => write!(f, "uint{bits}"),
            Self::Other(5, bits) => write!(f, "complex{bits}"),
            Self::Other(6, _) => f.write_str("bool"),
            Self::Other(code, bits) => write!(f, "a type of {bits} bits (DLPack's code {code})"),
        }
    }
}

/// Somebody else's array, kept alive.
pub struct Array {
    managed: NonNull<DLManagedTensor>,
}

// SAFETY: an array is memory and numbers; the deleter of a DLPack capsule may run on any thread.
unsafe impl Send for Array {}
// SAFETY: as above; nothing here changes it.
unsafe impl Sync for Array {}

impl Array {
    /// Consumes a capsule, as `torch.utils.dlpack.to_dlpack` makes it.
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
        NonNull::new(managed).map(|managed| Self { managed }).ok_or_else(|| PyValueError::new_err("an empty capsule"))
    }

    fn tensor(&self) -> &DLTensor {
        // SAFETY: valid until the deleter is called, which `Drop` does.
        unsafe { &self.managed.as_ref().tensor }
    }

    pub fn on_cpu(&self) -> bool {
        self.tensor().device_type == CPU
    }

    pub fn kind(&self) -> Kind {
        let tensor = self.tensor();
        match (tensor.code, tensor.bits, tensor.lanes) {
            (1, 8, 1) => Kind::Uint8,
            (0, 64, 1) => Kind::Int64,
            (4, 16, 1) => Kind::BFloat16,
            (2, 16, 1) => Kind::Float16,
            (2, 32, 1) => Kind::Float32,
            (2, 64, 1) => Kind::Float64,
            (code, bits, _) => Kind::Other(code, bits),
        }
    }

    pub fn shape(&self) -> Vec<usize> {
        let tensor = self.tensor();
        let ndim = usize::try_from(tensor.ndim).unwrap_or_default();
        // SAFETY: `shape` has `ndim` entries; it may be null where there are none.
        let shape = if ndim == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(tensor.shape, ndim) } };
        shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect()
    }

    /// Whether the elements of `shape` lie behind each other.
    pub fn is_contiguous(&self, shape: &[usize]) -> bool {
        let tensor = self.tensor();
        if tensor.strides.is_null() || shape.contains(&0) {
            return true;
        }
        // SAFETY: as many entries as dimensions, unless they are null.
        let strides = unsafe { std::slice::from_raw_parts(tensor.strides, shape.len()) };
        let mut expected = 1;
        for (&size, &stride) in shape.iter().zip(strides).rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected *= size as i64;
        }
        true
    }

    /// Where the first element is.
    pub fn start(&self) -> *mut u8 {
        let tensor = self.tensor();
        tensor.data.cast::<u8>().wrapping_add(usize::try_from(tensor.byte_offset).unwrap_or_default())
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: `new` took the ownership, so the deleter is ours to call, once.
        unsafe {
            if let Some(deleter) = self.managed.as_ref().deleter {
                deleter(self.managed.as_ptr());
            }
        }
    }
}
