"""``cnnrs evaluate``: a trained classifier on labelled photos that it has never seen."""

from __future__ import annotations

import argparse

from cnnrs._util.text import shown
from cnnrs.app.cli.output import chatter, complain, print_json
from cnnrs.app.jobs.evaluate import evaluate
from cnnrs.app.jobs.judge import headline


def run(options: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    with chatter(options.json):
        found = evaluate(
            options.model, options.folder, report=options.report, path_column=options.path_column,
            label_column=options.label_column, separator=options.separator, batch_size=options.batch_size,
            threads=options.threads, skip_bad=options.skip_bad,
        )  # fmt: skip
        for text in found.warnings:
            complain("evaluate", f"note: {text}")
    if options.json:
        print_json({**found.facts, "report": None if found.report is None else str(found.report)})
        return 0
    print(headline(found.facts))
    print(found)
    if found.report is not None:
        print(f"the report: {shown(str(found.report))}")
    return 0
