"""What the commands do, as functions: ``cnnrs.train`` and ``cnnrs.evaluate``."""
