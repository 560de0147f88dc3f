"""One image: which of a transform's steps run in Rust, and as what."""
