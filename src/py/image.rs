//! Which code decodes images in this process.

use pyo3::prelude::*;

use crate::image::{Verdict, own_jpeg_decoder};

/// Who decodes JPEGs in this process, in words.
#[pyfunction]
pub fn jpeg_decoder() -> &'static str {
    match own_jpeg_decoder() {
        Verdict::Agrees => "libjpeg-turbo with the entropy decoder of cnnrs",
        Verdict::Differs => {
            "libjpeg-turbo alone, which is slower: the entropy decoder of cnnrs got a test picture wrong; please report it"
        }
        Verdict::Unchecked => "libjpeg-turbo alone, which is slower: cnnrs was built without its private headers",
    }
}
