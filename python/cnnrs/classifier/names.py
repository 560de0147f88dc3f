"""What is said and written under fixed names: heads, and the files of a run. Nothing here waits for torch."""

from __future__ import annotations

HEADS = ("linear", "mlp", "classifier", "logistic", "ridge", "knn")
#: Solved for; the others are trained by gradient descent.
CLOSED = ("logistic", "ridge", "knn")

MODEL, CARD, HISTORY, NOVELTY = "model.safetensors", "model.json", "history.csv", "novelty.safetensors"
REPORT, MISTAKES, SUSPECTS = "report.html", "mistakes.csv", "suspects.csv"
#: Written for people beside the classifier; a run is whole without them.
SHOWN = (REPORT, MISTAKES, SUSPECTS)
#: Begins the name of a page about new photos.
EVALUATION = "evaluation-"
PARTIAL = ".partial"
#: Ends the name of a folder in which ``cnnrs check --fix`` puts what it takes away.
TRASH = ".cnnrs-trash"


def is_run_file(name: str) -> bool:
    """Whether a file of this name belongs to a run."""
    whole = name.removesuffix(PARTIAL)
    evaluation = whole.startswith(EVALUATION) and whole.endswith((".html", f"-{MISTAKES}"))
    return whole in (MODEL, CARD, HISTORY, NOVELTY, *SHOWN) or evaluation
