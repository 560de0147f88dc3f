//! Batches in, rows of features out, in the order they came.

use crate::engine::{Dtype, Extract, Rows};
use crate::error::{Error, Result};

/// Where rows go.
pub trait Sink {
    /// `row`: the shape of one row; called once, before the first `append`.
    ///
    /// # Errors
    /// When there is no place for them.
    fn begin(&mut self, row: &[usize], dtype: Dtype) -> Result<()>;

    /// # Errors
    /// When the rows cannot be kept.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
}

/// Runs every batch through the model and hands the rows on.
///
/// # Errors
/// Those of the batches, the model and the sink; rows of another shape or type than the first batch's.
pub fn extract<E: Extract>(
    model: &mut E,
    batches: impl IntoIterator<Item = Result<E::Inputs>>,
    sink: &mut impl Sink,
) -> Result<usize> {
    let mut first: Option<(Vec<usize>, Dtype)> = None;
    let mut count = 0;
    for batch in batches {
        let rows = model.features(batch?)?;
        let shape = rows.shape();
        let Some((&samples, row)) = shape.split_first() else {
            return Err(Error::Argument("features must have a batch dimension, got a scalar".to_owned()));
        };
        match &first {
            None => {
                sink.begin(row, rows.dtype())?;
                first = Some((row.to_vec(), rows.dtype()));
            }
            Some((expected, dtype)) if expected != row || *dtype != rows.dtype() => {
                return Err(Error::Argument(format!(
                    "features changed from {expected:?} ({dtype:?}) to {row:?} ({:?}) at sample {count}: all images must \
                     have one size, for example by Resize((224, 224))",
                    rows.dtype()
                )));
            }
            Some(_) => {}
        }
        sink.append(rows.bytes())?;
        count += samples;
    }
    Ok(count)
}

/// Rows in memory.
#[derive(Debug, Default)]
pub struct Memory {
    /// Rows to reserve memory for, 0 when unknown.
    pub expected: usize,
    pub row: Vec<usize>,
    pub dtype: Option<Dtype>,
    pub bytes: Vec<u8>,
}

impl Sink for Memory {
    fn begin(&mut self, row: &[usize], dtype: Dtype) -> Result<()> {
        self.row = row.to_vec();
        self.dtype = Some(dtype);
        let bytes = self.expected * row.iter().product::<usize>() * dtype.bytes();
        // One reservation: growing would copy everything several times and hold two copies while it does.
        self.bytes.try_reserve_exact(bytes).map_err(|_| {
            let gib = bytes as f64 / f64::from(1 << 30);
            Error::Argument(format!(
                "no memory for {} rows of features ({gib:.1} GiB): use out= to write to disk",
                self.expected
            ))
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}
