"""A trained classifier in a folder: weights, classes and preprocessing, without pickle."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import cnnrs
from cnnrs.folder import ImageList
from cnnrs.heads import Preprocessing, cut
from cnnrs.history import History
from cnnrs.weights import find

if TYPE_CHECKING:
    from torchvision import transforms

#: Version of ``model.json``; another number is not read.
FORMAT = 1
_CARD_KEYS = ("format", "backbone", "head", "dropout", "classes", "transform")
MODEL, CARD, HISTORY, REPORT = "model.safetensors", "model.json", "history.csv", "report.html"


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about one file.

    Attributes:
        path: the file.
        classes: names, most probable first.
        probabilities: theirs, 0 to 1.
    """

    path: str
    classes: list[str]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Its probability, 0 to 1."""
        return self.probabilities[0]


@dataclass
class Run:
    """A trained classifier, as ``cnnrs train`` leaves it in a folder.

    Attributes:
        model: the whole network in eval mode, (N, 3, H, W) float32 photos to (N, C) scores.
        classes: C names.
        preprocessing: what happens to a photo before the network.
        backbone: name of the network.
        head: "linear", "mlp" or "classifier".
        dropout: probability inside the head.
        facts: what else ``model.json`` says: where data and weights came from, accuracy, versions.
    """

    model: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    backbone: str
    head: str = "linear"
    dropout: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def transform(self) -> transforms.Compose:
        """The preprocessing as torchvision's objects."""
        return self.preprocessing.transform()

    def predict(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top_k: int = 1,
        batch_size: int = 32,
        num_workers: int | None = None,
        verbose: bool = True,
    ) -> tuple[list[Prediction], list[tuple[str, str]]]:
        """Classify photos.

        Args:
            paths: image files.
            top_k: how many classes are kept per file.
            batch_size: photos at a time.
            num_workers: threads that read photos; None: all cores.
            verbose: whether a bar is shown, on a terminal or in a notebook.

        Returns:
            Predictions in the order of ``paths``, and (path, reason) of files that could not be read.
        """
        files = [os.fspath(path) for path in paths]
        if not files:
            return [], []
        loader = cnnrs.DataLoader(
            ImageList(files, self.transform), batch_size=batch_size, num_workers=num_workers, on_error="skip"
        )
        try:
            scores = cnnrs.preconv(loader, self.model, verbose=verbose).features
        except (cnnrs.DecodeError, OSError, ValueError):
            if len({path for path, _ in loader.errors}) < len(set(files)):
                raise
            return [], _in_order(files, loader.errors)
        failed = {path for path, _ in loader.errors}
        good = [path for path in files if path not in failed]
        probabilities, order = scores.float().softmax(dim=1).sort(dim=1, descending=True)
        k = min(top_k, len(self.classes))
        return [
            Prediction(path, [self.classes[i] for i in classes], values)
            for path, classes, values in zip(good, order[:, :k].tolist(), probabilities[:, :k].tolist(), strict=True)
        ], _in_order(files, loader.errors)

    def recipe(self) -> str:
        """Python that opens the classifier, with cnnrs and without."""
        import torchvision

        ours = 'run = cnnrs.load_run("RUN")\npredictions, unreadable = run.predict(["photo.jpg"])'
        if self.backbone not in torchvision.models.list_models(module=torchvision.models) or self.head == "mlp":
            return ours
        plain = (
            f"model = torchvision.models.{self.backbone}(num_classes={len(self.classes)})\n"
            'model.load_state_dict(safetensors.torch.load_file("RUN/model.safetensors"))'
        )
        return f"{ours}\n\n# without cnnrs\n{plain}"

    def save(self, folder: str | os.PathLike[str], history: History | None = None) -> None:
        """Write ``model.safetensors``, ``model.json`` and ``history.csv``; a run that is there is replaced.

        The weights have the network's own key names: they load into torchvision's model with as many classes.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        card = {
            "format": FORMAT, "backbone": self.backbone, "head": self.head, "dropout": self.dropout,
            "classes": self.classes, "transform": asdict(self.preprocessing), **self.facts,
        }  # fmt: skip
        partial = place / f"{MODEL}.partial"
        try:
            save_file(state, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{place / MODEL} cannot be written: {error}") from error
        # The card goes first and comes back last: a folder is a run only while both belong together.
        (place / CARD).unlink(missing_ok=True)
        os.replace(partial, place / MODEL)
        if history is not None:
            _write_history(history, place / HISTORY)
        partial = place / f"{CARD}.partial"
        partial.write_bytes(_json(card))
        os.replace(partial, place / CARD)
        # safetensors makes files that only their owner can read.
        shutil.copymode(place / CARD, place / MODEL)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open what ``cnnrs train --out folder`` wrote.

    Args:
        folder: holds ``model.safetensors`` and ``model.json``.

    Returns:
        The classifier, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: it was written in another format, or its files contradict each other.

    Example:
        >>> run = load_run("runs/pets")  # doctest: +SKIP
        >>> predictions, unreadable = run.predict(["holiday/1.jpg"])  # doctest: +SKIP
    """
    place = Path(folder)
    card = read_card(place)
    if not (place / MODEL).is_file():
        raise FileNotFoundError(f"{place / MODEL} is gone, only {CARD} is there; train again")
    model = cut(find(card["backbone"], None), card["head"], len(card["classes"]), card["dropout"]).join()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(place / MODEL))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{place / MODEL} does not hold the {card['backbone']} of {CARD}: {reason}; train again"
        ) from error
    shaped: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["transform"].items()}
    preprocessing = Preprocessing(**shaped)
    facts = {name: value for name, value in card.items() if name not in _CARD_KEYS}
    return Run(model.eval(), card["classes"], preprocessing, card["backbone"], card["head"], card["dropout"], facts)


def read_card(folder: Path) -> dict[str, Any]:
    """What ``model.json`` says.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: it is damaged or in another format.
    """
    if not folder.is_dir():
        kind = "is a file; a folder that cnnrs train made is wanted" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {kind}")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        runs = sorted(str(path.parent) for path in folder.glob(f"*/{CARD}"))
        hint = f"there is one in {', '.join(runs[:3])}" if runs else f"cnnrs train --out {folder} makes one"
        raise FileNotFoundError(f"{folder} holds no trained model (no {CARD}): {hint}") from None
    except ValueError as error:
        raise ValueError(f"{folder / CARD} is damaged ({error}); train again") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise ValueError(
            f"{folder / CARD} is in format {found}, this cnnrs {cnnrs.__version__} reads format {FORMAT}: "
            "use the cnnrs that wrote it, or train again"
        )
    if missing := [name for name in _CARD_KEYS if name not in card]:
        raise ValueError(f"{folder / CARD} is damaged: it lacks {', '.join(missing)}; train again")
    return card


def _json(card: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(card, indent=1, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        # A folder's name may be no UTF-8; escaped, it comes back as it was.
        text = json.dumps(card, indent=1).encode("ascii")
    return text + b"\n"


def _write_history(history: History, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"])
        columns = (history.train_losses, history.train_accuracy, history.val_losses, history.val_accuracy)
        for epoch, row in enumerate(zip(*columns, strict=True), 1):
            writer.writerow([epoch, *(f"{value:.6g}" for value in row)])


def _in_order(files: Sequence[str], errors: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    reasons = dict(errors)
    return [(path, reasons[path]) for path in dict.fromkeys(files) if path in reasons]
