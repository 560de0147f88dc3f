"""What every package may use: text, notes, progress, plots, JSON, and what Python and torch lack."""
