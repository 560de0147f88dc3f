"""A trained classifier in a folder: weights, classes and preprocessing, without pickle."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cnnrs._util.json import dumps
from cnnrs.classifier.card import FORMAT, KEYS, MORE, read_card
from cnnrs.classifier.heads import Preprocessing, cut
from cnnrs.classifier.names import CARD, EVALUATION, HISTORY, MODEL, NOVELTY, PARTIAL, SHOWN, is_run_file
from cnnrs.classifier.neighbours import Neighbours
from cnnrs.classifier.novelty import Novelty
from cnnrs.classifier.predictions import Predictions, Predictor, Unknown
from cnnrs.classifier.recipe import recipe
from cnnrs.model.weights import find
from cnnrs.training.history import History

if TYPE_CHECKING:
    from torchvision import transforms

# Classes that a run names when it is printed.
_SHOWN = 6


@dataclass(repr=False)
class Run:
    """A trained classifier, as ``cnnrs train`` leaves it in a folder.

    Attributes:
        model: the whole network in eval mode, (N, 3, H, W) float32 photos to (N, C) scores.
        classes: C names.
        preprocessing: what happens to a photo before the network.
        backbone: name of the network.
        head: one of ``names.HEADS``.
        dropout: probability inside the head.
        facts: what else ``model.json`` says: where data and weights came from, accuracy, versions.
        options: what torchvision's builder needs beside the network's name.
        read: how photos are read, as arguments of :class:`cnnrs.DataLoader`: ``{"exif": True}``.
        multilabel: whether a photo may have several labels: the scores are probabilities one by one, by a sigmoid.
        novelty: what knows photos that are none of the classes, None where there is none.
        head_path: where in the model the head is; "": where the network of this name has it.
        folder: where it was saved, or opened.
    """

    model: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    backbone: str
    head: str = "linear"
    dropout: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    multilabel: bool = False
    novelty: Novelty | None = None
    head_path: str = ""
    folder: Path | None = None

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:_SHOWN]) + ", ..." * (len(self.classes) > _SHOWN)
        right = f", {self.accuracy:.2f} % right" if self.accuracy is not None else ""
        return f"Run({self.backbone}, head {self.head!r}, {len(self.classes)} classes: {names}{right})"

    @property
    def accuracy(self) -> float | None:
        """Per cent of the photos it was measured with that are right, None where nobody has measured."""
        found = self.facts.get("accuracy")
        return float(found) if isinstance(found, (int, float)) else None

    @property
    def transform(self) -> transforms.Compose:
        """The preprocessing as torchvision's objects."""
        return self.preprocessing.transform()

    def predict(
        self,
        photos: Any,
        *,
        top_k: int = 1,
        unknown: Unknown = "auto",
        batch_size: int = 32,
        num_workers: int | None = None,
        verbose: bool = True,
    ) -> Predictions:
        """Classify photos.

        Args:
            photos: the path of a file; of a folder, with all photos below it that are not hidden; a PIL image; an
                (H, W, C) array or a (C, H, W) tensor, uint8 or floats from 0 to 1, or a batch of them; an
                :class:`cnnrs.ImageList`; or an iterable of any of these.
            top_k: how many classes are kept per photo.
            unknown: from which novelty on a photo is unknown: "auto" is what all but one in a hundred photos of the
                classes keep within, "off" takes no photo for unknown.
            batch_size: photos at a time.
            num_workers: threads that read photos; None: all cores.
            verbose: whether a bar is shown, on a terminal or in a notebook.

        Returns:
            :class:`Predictions` in the order of the photos, which unpack in two: the predictions, and (path, reason) of
            files that could not be read.

        Raises:
            FileNotFoundError: a folder has no photos.
            TypeError: it is something else.
            ValueError: an array or tensor is no image; a number as ``unknown`` where the run knows no novelty.

        Example:
            >>> predictions, unreadable = run.predict("holiday")  # doctest: +SKIP
            >>> run.predict(["a.jpg", PIL.Image.open("b.jpg")], top_k=3).to_csv("top3.csv")  # doctest: +SKIP
        """
        # Without novelty nobody asks for the features in between.
        body, head = (self.model, nn.Identity()) if self.novelty is None else self.halves()
        limits = torch.tensor(self.facts.get("thresholds", [0.5] * len(self.classes))) if self.multilabel else None
        predictor = Predictor(self.transform, body, head, self.classes, limits, self.novelty, self.read)
        return predictor(photos, top_k, unknown, batch_size, num_workers, verbose)

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The body, from photos to features, and the head, from features to scores; they share the model's weights."""
        path = self.head_path
        if not path and self.head == "classifier":
            path = "classifier"
        if not path:
            last = find(self.backbone, None, self.options).last
            assert last is not None
            path = last[0]
        return _without(self.model, path), self.model.get_submodule(path)

    def recipe(self, folder: str = "RUN", photo: str = "photo.jpg") -> str:
        """Python that opens the classifier in ``folder`` and asks it about ``photo``, with cnnrs and without."""
        return recipe(self, folder, photo)

    def save(self, folder: str | os.PathLike[str], history: History | None = None, *, force: bool = False) -> None:
        """Write ``model.safetensors``, ``model.json``, ``history.csv`` and, where there is novelty, that.

        A run that is there is replaced, unless it is a better one. The weights have the network's own key names: they
        load into torchvision's model with as many classes.

        Args:
            folder: made when needed.
            history: losses and accuracies by epoch.
            force: replace a better run, too.

        Raises:
            FileExistsError: more photos are right by the run that is there.
        """
        place = Path(folder)
        if not force:
            self.check_better(place)
        place.mkdir(parents=True, exist_ok=True)
        card = {
            "format": FORMAT, "backbone": self.backbone, "head": self.head, "dropout": self.dropout,
            "classes": self.classes, "transform": asdict(self.preprocessing),
            **({"options": self.options} if self.options else {}), **({"read": self.read} if self.read else {}),
            **({"multilabel": True} if self.multilabel else {}), **({"novelty": NOVELTY} if self.novelty else {}),
            **self._neighbours(),
            **self.facts,
        }  # fmt: skip
        state = self.model.state_dict()
        tensors = {MODEL: {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}}
        if self.novelty is not None:
            tensors[NOVELTY] = self.novelty.state()
        names = [*tensors, *([] if history is None else [HISTORY]), CARD]
        partial = {name: place / f"{name}{PARTIAL}" for name in names}
        try:
            for name, state in tensors.items():
                _write_tensors(state, partial[name], place / name)
            if history is not None:
                history.to_csv(partial[HISTORY])
            partial[CARD].write_bytes(f"{dumps(card)}\n".encode())
            for name in tensors:
                # safetensors makes files that only their owner can read.
                shutil.copymode(partial[CARD], partial[name])
            for path in partial.values():
                _flush(path)
        except BaseException:
            for path in partial.values():
                path.unlink(missing_ok=True)
            raise
        # The card goes first and comes back last: a folder is a run only while all of it belongs together.
        pages = [path.name for path in place.glob(f"{EVALUATION}*") if is_run_file(path.name)]
        for name in (CARD, *SHOWN, HISTORY, NOVELTY, *pages):
            (place / name).unlink(missing_ok=True)
        for name in names:
            os.replace(partial[name], place / name)
        self.folder = place

    def _neighbours(self) -> dict[str, Any]:
        """What the card says of a head that is made of rows, so that it can be built again."""
        found = [module for module in self.model.modules() if isinstance(module, Neighbours)]
        return {"neighbours": found[0].shape()} if found else {}

    def check_better(self, folder: str | os.PathLike[str]) -> None:
        """That a folder holds no run that was better on the same photos: accuracy, or mean average precision.

        Raises:
            FileExistsError: it does; says how much better, and proposes another folder.
        """
        place = Path(folder)
        try:
            card = read_card(place)
        except (FileNotFoundError, ValueError):
            # No run, or one that nobody can open.
            return
        name = "mean_average_precision" if self.multilabel else "accuracy"
        there, here = card.get(name), self.facts.get(name)
        if not isinstance(there, (int, float)) or not isinstance(here, (int, float)) or there <= here:
            return
        if card.get("measured_with") != self.facts.get("measured_with"):
            return
        raise FileExistsError(
            f"{place} holds a better run: {name.replace('_', ' ')} {there:.2f} %, {here:.2f} % by this one; give "
            f"another folder, '{beside(place)}' for example, or force to replace it"
        )


def beside(place: Path) -> Path:
    """A name for another run beside one."""
    return next(name for i in count(2) if not os.path.lexists(name := place.with_name(f"{place.name}-{i}")))


def _write_tensors(state: dict[str, Tensor], path: Path, shown: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{shown} cannot be written: {error}") from error


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
    try:
        found = find(card["backbone"], None, card.get("options"))
        parts = cut(found, card["head"], len(card["classes"]), card["dropout"])
        model = parts.join(*([Neighbours.of(card["neighbours"])] if "neighbours" in card else []))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place / CARD}: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, what = place / MODEL, f"the {card['backbone']}"
    try:
        model.load_state_dict(load_file(path))
        path, what = place / NOVELTY, "what belongs to the classifier"
        novelty = Novelty.from_state(load_file(path)) if "novelty" in card else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is gone, only {CARD} is there; train again") from error
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{path} does not hold {what} of {CARD}: {reason}; train again") from error
    shaped: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["transform"].items()}
    preprocessing = Preprocessing(**shaped)
    facts = {name: value for name, value in card.items() if name not in (*KEYS, *MORE)}
    return Run(
        model.eval(), card["classes"], preprocessing, card["backbone"], card["head"], card["dropout"], facts,
        dict(found.options), card.get("read", {}), card.get("multilabel", False), novelty,
        found.last[0] if found.last is not None and card["head"] != "classifier" else "", place,
    )  # fmt: skip


def _without(model: nn.Module, path: str) -> nn.Module:
    """The network with nothing in the place of a layer: a copy that shares all others."""
    name, _, rest = path.partition(".")
    shallow = copy.copy(model)
    shallow._modules = dict(model._modules)
    inner = model.get_submodule(name)
    shallow._modules[name] = _without(inner, rest) if rest else nn.Identity()
    return shallow


def _flush(path: Path) -> None:
    # Windows flushes only what may be written.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
