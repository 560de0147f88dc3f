//! What goes wrong in libtorch, as an error of cnnrs.

use cnnrs::error::Error;
use tch::TchError;

pub type Result<T> = std::result::Result<T, Failure>;

/// An error of cnnrs that `?` makes of libtorch's as well.
pub struct Failure(pub Error);

impl From<TchError> for Failure {
    fn from(error: TchError) -> Self {
        // libtorch appends its C++ stack after the first line; nobody can act on it.
        let text = match error {
            TchError::Torch(text) => text,
            other => other.to_string(),
        };
        Self(Error::Torch(text.split("\nException raised from").next().unwrap_or_default().to_owned()))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}
