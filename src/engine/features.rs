//! What engines compute for `features`.

/// Element types of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// NumPy has no such type: a `.npy` file holds its bits as uint16.
    BFloat16,
    Float16,
    Float32,
    Float64,
}

impl Dtype {
    /// NumPy's type string.
    pub fn descr(self) -> &'static str {
        match self {
            Self::BFloat16 => "<u2",
            Self::Float16 => "<f2",
            Self::Float32 => "<f4",
            Self::Float64 => "<f8",
        }
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::BFloat16 | Self::Float16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }
}

/// The features of one batch in CPU memory, row-major.
pub trait Rows {
    /// Batch first.
    fn shape(&self) -> Vec<usize>;
    fn dtype(&self) -> Dtype;
    fn bytes(&self) -> &[u8];
}
