"""Features of big collections on the workers of a Ray cluster; needs ``pip install 'cnnrs[ray]'``."""

from cnnrs.features.on_ray import Extract, extract

__all__ = ["Extract", "extract"]
