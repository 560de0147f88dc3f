"""``python -m cnnrs`` is the command ``cnnrs``."""

import sys

from cnnrs.cli import main

sys.exit(main())
