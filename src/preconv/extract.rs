//! Batches in, rows of features out.

use crate::engine::{Dtype, Extract, Rows};
use crate::error::{Error, Result};

/// Where the rows of a batch belong.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// (first row, rows), in the order of the batch; empty: behind the rows before.
    pub runs: Vec<(u64, u64)>,
    /// What the commit record says about these rows, as JSON.
    pub tag: String,
}

/// What the model reads, and where its rows go.
#[derive(Debug)]
pub struct Batch<I> {
    pub inputs: I,
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

/// Runs every batch through the model and hands the rows on.
///
/// # Errors
/// Those of the batches, the model and the sink; rows of another shape or type than the first batch's.
pub fn extract<E: Extract>(
    model: &mut E,
    batches: impl IntoIterator<Item = Result<Batch<E::Inputs>>>,
    sink: &mut impl Sink,
) -> Result<usize> {
    let mut first: Option<(Vec<usize>, Dtype)> = None;
    let mut count = 0;
    for batch in batches {
        let Batch { inputs, place } = batch?;
        let rows = model.features(inputs)?;
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
        sink.append(Box::new(rows), place)?;
        count += samples;
    }
    Ok(count)
}
