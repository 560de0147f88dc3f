"""The demo: real images to trained classifiers."""
