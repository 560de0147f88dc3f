//! One error for the whole crate, sorted by whose fault it is, always with the file or the value it is about.

use std::any::Any;
use std::io;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    // -- the file system's -----------------------------------------------------------------------------------------------
    /// Reading or writing failed; becomes the `OSError` subclass of its errno.
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },

    // -- the data's ------------------------------------------------------------------------------------------------------
    /// The bytes of a file cannot be turned into pixels or labels.
    #[error("{}cannot be decoded: {reason}", prefix(path))]
    Decode { path: PathBuf, reason: String, kind: DecodeKind },
    /// The image is larger than the limits allow (checked before anything is allocated).
    #[error("{}image of {width} x {height} pixels is over the limit of {limit} pixels", prefix(path))]
    TooLarge { path: PathBuf, width: u64, height: u64, limit: u64 },

    // -- the caller's ----------------------------------------------------------------------------------------------------
    /// The system has no memory for a buffer whose size the file, the transform or the batch decides.
    #[error("{}not enough memory for {bytes} bytes", prefix(path))]
    OutOfMemory { path: PathBuf, bytes: usize },
    /// As [`Error::OutOfMemory`], of memory that a model and its batch decide: what it is for, and what takes less.
    #[error("{0}")]
    NoMemory(String),
    /// The system starts no more threads.
    #[error("{0}")]
    Threads(String),
    /// An argument makes no sense.
    #[error("{0}")]
    Argument(String),
    /// It makes sense, but is not done here; says what does it, where something does.
    #[error("{0}")]
    Unsupported(String),
    /// A layer cannot take the shape that reaches it.
    #[error("{layer}: {reason}")]
    Shape { layer: String, reason: String },

    /// A class index that the model has no output for.
    #[error("Target {target} is out of bounds: the model has {classes} outputs, so classes are 0..={}", classes - 1)]
    Target { target: i64, classes: i64 },

    // -- training's ------------------------------------------------------------------------------------------------------
    /// An engine would not take a batch.
    #[error("{0}")]
    Refused(Box<Error>),
    /// The loss is NaN or infinite.
    #[error("loss is {loss} in {phase} epoch {epoch}, batch {batch}; the last finite loss was {last}")]
    NotFinite { loss: f64, last: String, phase: &'static str, epoch: i64, batch: usize },
    /// Ctrl-C or an exception raised by Python code that we called: the binding re-raises the pending exception.
    #[error("interrupted")]
    Interrupted,

    // -- below us --------------------------------------------------------------------------------------------------------
    /// libtorch refused; its own message.
    #[error("{0}")]
    Torch(String),
    /// A panic that was caught: a bug of ours.
    #[error("internal error: {0}")]
    Panic(String),
    /// What cannot be, whatever the caller does.
    #[error("{0}: this is a fault of cnnrs, please report it")]
    Internal(String),
}

/// Why bytes cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeKind {
    /// Of no format that is known.
    Unknown,
    /// Of a known format, in a way that is not read.
    Unsupported,
    /// They end too early.
    Truncated,
    Damaged,
    /// Over a limit; bytes over the limit are not read.
    TooLarge,
}

impl DecodeKind {
    /// Python's name, see `cnnrs.errors.DecodeKind`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Unsupported => "unsupported",
            Self::Truncated => "truncated",
            Self::Damaged => "damaged",
            Self::TooLarge => "too_large",
        }
    }
}

/// What a caught panic said.
pub fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".to_owned())
}

fn prefix(path: &Path) -> String {
    if path.as_os_str().is_empty() { String::new() } else { format!("{}: ", path.display()) }
}

impl Error {
    /// The same error with the path filled in, for stages that saw only bytes.
    #[must_use]
    pub fn at(self, file: &Path) -> Self {
        match self {
            Self::Decode { reason, kind, .. } => Self::Decode { path: file.into(), reason, kind },
            Self::TooLarge { width, height, limit, .. } => Self::TooLarge { path: file.into(), width, height, limit },
            Self::OutOfMemory { bytes, .. } => Self::OutOfMemory { path: file.into(), bytes },
            other => other,
        }
    }

    pub fn memory(bytes: usize) -> Self {
        Self::OutOfMemory { path: PathBuf::new(), bytes }
    }

    /// The same error as an engine's, about a batch; what Python raised and what needs no second opinion stay as they are.
    #[must_use]
    pub fn refused(self) -> Self {
        match self {
            Self::Shape { .. } | Self::Argument(_) | Self::Unsupported(_) | Self::Torch(_) => {
                Self::Refused(Box::new(self))
            }
            other => other,
        }
    }

    /// Of a file that breaks its format's rules.
    pub fn decode(reason: impl ToString) -> Self {
        Self::undecodable(DecodeKind::Damaged, reason)
    }

    pub fn undecodable(kind: DecodeKind, reason: impl ToString) -> Self {
        Self::Decode { path: PathBuf::new(), reason: reason.to_string(), kind }
    }

    /// As [`Error::decode`], of a file that ends too early.
    pub fn truncated(reason: impl ToString) -> Self {
        Self::undecodable(DecodeKind::Truncated, reason)
    }

    /// As [`Error::decode`], of a file that other programs may well read.
    pub fn unsupported(reason: impl ToString) -> Self {
        Self::undecodable(DecodeKind::Unsupported, reason)
    }

    pub fn internal(what: impl ToString) -> Self {
        Self::Internal(what.to_string())
    }
}
