"""What people start: the command line, reports, the demo."""
