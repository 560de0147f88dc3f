"""The frozen part once: rows of features, kept on disk so that nothing computed is lost."""
