"""``cnnrs train``: a frozen pretrained network, features computed once, a head trained on them."""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path

from cnnrs._util.text import shown
from cnnrs.app.cli.output import chatter, complain, print_json
from cnnrs.app.jobs.judge import headline
from cnnrs.app.jobs.train import train
from cnnrs.classifier.names import REPORT


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    wanted = set(inspect.signature(train).parameters) - {"data", "verbose"}
    given = {name: value for name, value in vars(options).items() if name in wanted}
    with chatter(options.json):
        done = train(options.folder, **given, verbose=not options.quiet)
        place = Path(done.folder or ".")
        if options.quiet:
            # The others have seen them.
            for text in done.facts["warnings"]:
                complain("train", f"note: {text}")
            print(headline(done.facts))
        else:
            print(f"next: cnnrs predict {shown(shlex.quote(str(place)))} PHOTO...")
    if options.json:
        print_json({"run": str(place), **done.facts, "classes": done.classes, "report": str(place / REPORT)})
    return 0
