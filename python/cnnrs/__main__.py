"""``python -m cnnrs`` is the command ``cnnrs``."""

import sys

from cnnrs.app.cli import main

sys.exit(main())
