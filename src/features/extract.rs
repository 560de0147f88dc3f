//! Batches of features to where they are kept.

use crate::engine::{Dtype, Rows};
use crate::error::{Error, Result};

/// Where the rows of a batch belong.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// (first row, rows), in the order of the batch; empty: behind the rows before.
    pub runs: Vec<(u64, u64)>,
    /// The identities of these rows, for the journal.
    pub ids: Vec<String>,
}

/// What the model made, and where it goes.
pub struct Batch {
    pub rows: Box<dyn Rows + Send>,
    pub place: Place,
}

/// Where rows go.
pub trait Sink {
    /// `row`: the shape of one row; called once, before the first `append`.
    ///
    /// # Errors
    /// When there is no place for them.
    fn begin(&mut self, row: &[usize], dtype: Dtype) -> Result<()>;

    /// # Errors
    /// When the rows cannot be kept.
    fn append(&mut self, rows: Box<dyn Rows + Send>, place: Place) -> Result<()>;
}

/// Hands the rows of every batch on; returns their number.
///
/// # Errors
/// Those of the batches and the sink; rows of another shape or type than the first batch's.
pub fn extract(batches: impl IntoIterator<Item = Result<Batch>>, sink: &mut impl Sink) -> Result<usize> {
    let mut first: Option<(Vec<usize>, Dtype)> = None;
    let mut count = 0;
    for batch in batches {
        let Batch { rows, place } = batch?;
        let shape = rows.shape();
        let Some((&samples, row)) = shape.split_first() else {
            return Err(Error::Argument("features must have a batch dimension, got a scalar".to_owned()));
        };
        let places: u64 = place.runs.iter().map(|run| run.1).sum();
        if !place.runs.is_empty() && places != samples as u64 {
            return Err(Error::Argument(format!("the model made {samples} rows of {places} images")));
        }
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
        sink.append(rows, place)?;
        count += samples;
    }
    Ok(count)
}
