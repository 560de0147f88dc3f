//! Rows in memory.

use super::{Place, Sink};
use crate::engine::{Dtype, Rows};
use crate::error::{Error, Result};

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
            Error::NoMemory(format!(
                "no memory for {} rows of features ({gib:.1} GiB): use out= to write to disk",
                self.expected
            ))
        })
    }

    fn append(&mut self, rows: Box<dyn Rows + Send>, _place: Place) -> Result<()> {
        self.bytes.extend_from_slice(rows.bytes());
        Ok(())
    }
}
