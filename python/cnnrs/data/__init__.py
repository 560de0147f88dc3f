"""Many images: data sets, the loader and its iterators, caches, bad files."""
