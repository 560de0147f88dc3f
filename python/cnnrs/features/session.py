"""One call of `preconv`: what is right is opened, what is missing is computed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from cnnrs._cnnrs import __version__
from cnnrs._util.generators import Generators
from cnnrs._util.notes import note
from cnnrs._util.progress import progress
from cnnrs._util.text import shown
from cnnrs.data.loader import DataLoader
from cnnrs.features.calibration import IMAGES, Calibration
from cnnrs.features.extract import Extractor
from cnnrs.features.features import Features
from cnnrs.features.features import stored as stored_features
from cnnrs.features.held import check_model, name_of
from cnnrs.features.plan import Plan
from cnnrs.features.samples import Batch, Data
from cnnrs.features.store import FORMAT, Store
from cnnrs.features.update import Compute, File, Item, Update, placed
from cnnrs.identity.fingerprint import Unidentifiable, fingerprint


class Session:
    """One call of `preconv`."""

    def __init__(
        self, data: Data, model: nn.Module, extractor: Extractor, verbose: bool, overwrite: bool = False
    ) -> None:
        self.data = data
        self.model = model
        self.extractor = extractor
        self.verbose = verbose
        self.overwrite = overwrite
        extractor.quiet = not data.runs_python
        extractor.beside = not data.has_threads
        data.device = extractor.device
        # Replaced where several processes share the work.
        self.computes: Compute | None = None

    def in_memory(self, passes: int, seed: int) -> Features:
        """Features as the loader gives them, or `passes` passes in the order of the data set."""
        if passes == 1:
            return self._stream(None)
        plan = self.plan(passes, seed)
        self._calibrated(seed)
        labels: list[torch.Tensor] = []
        samples: list[int] = []

        cut = _cut(plan.samples, plan.batch_size)
        batches = (batch for number in range(passes) for batch in self.data.batches(cut, seed, number))
        items = placed(_recorded(batches, labels, samples))
        features = self.extractor(self._bar(items, plan.rows), None, plan.rows)
        assert features is not None
        self._note_draws()
        return self._made(features, labels, samples)

    def _stream(self, path: os.PathLike[str] | None) -> Features:
        self._calibrated(0)
        labels: list[torch.Tensor] = []
        samples: list[int] = []

        items = placed(_recorded(self.data.stream(), labels, samples))
        file: File | None = None
        if path is not None:
            file = {"path": path, "journal": None, "total": None, "resume": False}
        features = self.extractor(self._bar(items, self.data.expected), file, self.data.expected)
        self._note_draws()
        if features is None:
            # On disk; the caller opens it.
            features = torch.empty(0)
        return self._made(features, labels, samples)

    def _made(self, features: torch.Tensor, labels: list[torch.Tensor], samples: list[int]) -> Features:
        files = self.data.files
        paths = None if files is None or not samples else [files[i] for i in samples]
        made = _joined(labels)
        images = samples if files is None and len(set(samples)) < len(samples) else None
        return Features(
            features, made, paths, self.data.classes, None, self.model, images, self.data.transform, self.data.read
        )

    def _bar(self, items: Iterator[Item], rows: int) -> Iterator[Item]:
        return progress(items, "features", verbose=self.verbose, samples=rows)

    # -- a folder --------------------------------------------------------------------------------------------

    def in_folder(self, store: Store, passes: int, seed: int) -> Features:
        """The stored features, when they are right; else after everything that is missing has been computed."""
        if self.unidentified:
            if passes > 1:
                self.plan(passes, seed)
            return self._everything(store)
        plan = self.plan(passes, seed)
        # What this process could not read before is tried again, unless the store says that there is no use.
        self.data.forget_faults()
        if (stored := self._right(store, plan)) is not None:
            return stored
        with store.locked(self.verbose):
            # Another process may have computed them while this one waited.
            if (stored := self._right(store, plan)) is not None:
                return stored
            meta = store.meta()
            self._check_model(store, meta)
            changes = self._changes(meta, plan)
            usable = meta if meta is not None and not changes else None
            if usable is not None and self._same_rows(store, plan, usable):
                # Only names, times or labels are others.
                now = plan.meta(usable["ids"])
                try:
                    store.discard()
                    store.commit(store.layout(usable), plan.labels(), now)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                    # A folder that may only be read keeps the old ones; the features are right all the same.
                    made = self._opened(
                        store, {**usable, "paths": now["paths"], "classes": now["classes"]}, plan.labels()
                    )
                    if made is not None:
                        return made
                    raise
            else:
                if changes:
                    self._say(f"{store.folder}: recomputing the features, because {' and '.join(changes)}")
                Update(
                    store, plan, self.computes or self.compute, lambda text: self._say(f"{store.folder}: {text}")
                ).run(usable)
            meta = store.meta()
            made = None if meta is None else self._opened(store, meta, plan.labels())
            if meta is not None:
                self._say_what_is_special(store, meta)
        if made is None:
            raise OSError(f"{store.folder} changed although it is locked: is something else writing there?")
        return made

    def compute(self, update: Update, file: File) -> None:
        """Compute what is missing and write it."""
        items = self._bar(update.items(), update.count)
        first = next(items, None)
        if first is None:
            # All of the files that are missing failed and are skipped.
            return
        self.extractor.order = update.plan.order
        self._calibrated(update.plan.seed, update)
        self.extractor(chain([first], items), file, update.count, update.keep_order)
        self._note_draws()
        update.plan.random = update.plan.random or self.extractor.draws

    def _calibrated(self, seed: int, update: Update | None = None) -> None:
        """Tell the extractor what int8 layers read, or where it finds that."""
        if self.extractor.precision != "int8":
            return
        made = Calibration(first_images=lambda: self._first_images(seed)) if self.data.has_order else Calibration()
        if update is not None:
            made.ranges, made.found = update.plan.calibration, update.keep_calibration
        self.extractor.calibration = made

    def _first_images(self, seed: int) -> Iterator[torch.Tensor]:
        """Those of the data set, in its own order, as the first pass has them."""
        samples = list(range(min(IMAGES, len(self.data))))
        generators = Generators()
        try:
            for batch in self.data.batches(_cut(samples, 32), seed):
                yield batch.inputs
        finally:
            # The pass to come draws what it would have drawn.
            if not self.data.runs_python:
                generators.put_back()

    def calibrate(self, update: Update) -> None:
        """Find what int8 layers read, where nothing says it yet."""
        if self.extractor.precision == "int8" and update.plan.calibration is None:
            self._calibrated(update.plan.seed, update)
            self.extractor.calibrate()

    def _note_draws(self) -> None:
        if self.extractor.draws:
            note(
                f"the features of this model are drawn at random, although it is in eval mode: {self.extractor.draws}. "
                "In a folder they stay as they were drawn first"
            )

    @property
    def unidentified(self) -> str:
        """Why it cannot be told whether stored features are these; "" when it can."""
        return self.data.unidentified or (self._model_handle and f"the model holds {self._model_handle}")

    def plan(self, passes: int, seed: int) -> Plan:
        """The rows there shall be.

        Raises:
            ValueError: passes of data that cannot be told apart, or whose augmentation cannot be keyed.
        """
        if self.data.unidentified and passes > 1:
            raise ValueError(f"passes={passes} needs a loader over an image folder: {self.data.unidentified}")
        loader: Any = self.data.data
        if passes > 1 and not isinstance(loader, DataLoader):
            raise ValueError(
                f"passes={passes} needs a cnnrs.DataLoader, whose augmentation depends on seed and image only"
            )
        if passes > 1 and not self.data.is_random:
            note(f"passes={passes}, but the transform draws nothing at random: all passes are the same")
        settings = {
            "transform": self.data.recipe,
            "model": self._model_key,
            # The other two have the same bits.
            "engine": "torch" if self.extractor.engine in ("torch", "python") else "",
            "precision": self.extractor.computes_in,
            "dtype": self.extractor.dtype or "",
            "seed": str(seed) if self.data.is_random else "",
            "versions": _versions(self.model),
        }
        shown = IMAGES if self.extractor.precision == "int8" else 0
        batch_size = loader.batch_size or 1
        return Plan(
            self.data, settings, passes, seed, batch_size, random=self.extractor.draws, network=name_of(self.model),
            shown=shown,
        )  # fmt: skip

    def _check_model(self, store: Store, meta: dict[str, Any] | None) -> None:
        if not self.overwrite:
            check_model(store, meta, name_of(self.model), self._model_key)

    @cached_property
    def _identity(self) -> tuple[str, str]:
        """The hash of what the model computes, whoever runs it; what in it cannot be compared. One of them is ""."""
        try:
            # Not by tracing, which would call forward for nothing.
            return fingerprint(self.model), ""
        except Unidentifiable as what:
            return "", str(what)

    @property
    def _model_key(self) -> str:
        return self._identity[0]

    @property
    def _model_handle(self) -> str:
        return self._identity[1]

    def _changes(self, meta: dict[str, Any] | None, plan: Plan) -> list[str]:
        """What makes all stored features unusable, in words."""
        if meta is None:
            return []
        if meta.get("format") != FORMAT:
            return [f"they are stored in format {meta.get('format')}, not {FORMAT}"]
        if meta["key"] is None:
            return ["cnnrs cannot tell which images they are of"]
        old, new = meta["key"], plan.key
        # Only between ranges for int8 there is a difference of their images.
        alike = "calibration" in old and "calibration" in new
        names = (name for name in _WORDS if name != "calibration" or alike)
        return [_WORDS[name] for name in names if old.get(name) != new.get(name)]

    def _right(self, store: Store, plan: Plan) -> Features | None:
        """The stored features, when every row is the plan's and undamaged, and names and labels are right."""
        meta = store.meta()
        if meta is None or meta.get("format") != FORMAT:
            return None
        plan.know_files(meta)
        if meta["key"] != plan.key:
            return None
        plan.know(meta)
        if getattr(self.data.data, "on_error", "raise") == "skip":
            plan.skip_again(meta)
        if not self._same_rows(store, plan, meta):
            return None
        labels = plan.labels()
        expected = plan.meta(meta["ids"])
        try:
            same = torch.equal(store.labels(meta), labels)
        except ValueError:
            same = False
        if not same or any(meta[name] != _plain(expected[name]) for name in ("paths", "classes", "stats")):
            return None
        found = self._opened(store, meta, labels)
        if found is not None:
            self._say(f"{store.folder}: {len(labels)} features are up to date, nothing to compute")
            self._say_what_is_special(store, meta)
        return found

    def _say_what_is_special(self, store: Store, meta: dict[str, Any]) -> None:
        """In what a store is not what its images and its model alone would make of it."""
        if why := meta.get("random"):
            self._say(f"{store.folder}: these features were drawn at random and are kept as they are: {why}")
        if skipped := meta["skipped"]:
            count = "1 photo is" if len(skipped) == 1 else f"{len(skipped)} photos are"
            self._say(
                f"{store.folder}: {count} left out{' (the first)' if len(skipped) > 1 else ''}: {shown(skipped[0][1])}"
            )

    def opened(self, store: Store, plan: Plan) -> Features | None:
        """The features of the store, when they are the plan's."""
        meta = store.meta()
        if meta is None or meta["key"] != plan.key:
            return None
        # What the store leaves out, not what could be read by now.
        plan.skip({path: reason for path, reason, _ in meta["skipped"]})
        if meta["shape"][0] != plan.rows:
            return None
        return self._opened(store, meta, plan.labels())

    def _opened(self, store: Store, meta: dict[str, Any], labels: torch.Tensor) -> Features | None:
        features = store.features(meta)
        if features is None:
            return None
        made = stored_features(features, labels, meta, store.folder, self.model)
        made.transform, made.read = self.data.transform, self.data.read
        return made

    @staticmethod
    def _same_rows(store: Store, plan: Plan, meta: dict[str, Any]) -> bool:
        return plan.is_of(meta) and store.is_whole(meta)

    def _everything(self, store: Store) -> Features:
        """Data that cannot be told apart: computed anew each time."""
        with store.locked(self.verbose):
            self._check_model(store, store.meta())
            if store.meta() is not None:
                what = "these are the same images" if self.data.unidentified else "the model is the same"
                self._say(
                    f"{store.folder}: recomputing the features, because cnnrs cannot tell whether {what} "
                    f"({self.unidentified})"
                )
            store.discard()
            made = self._stream(store.path("features.npy.partial"))
            layout = store.partial_layout()
            assert layout is not None
            meta = {
                "paths": made.paths, "classes": made.classes, "passes": 1, "key": None, "stats": None, "ids": None,
                "network": name_of(self.model), "skipped": [],
                **({"random": self.extractor.draws} if self.extractor.draws else {}),
                **({"order": self.extractor.order} if self.extractor.order == "channels_last" else {}),
                **({"calibration": ranges} if (ranges := self.extractor.calibration.ranges) else {}),
            }  # fmt: skip
            store.commit(layout, made.labels, meta)
            opened = self._opened(store, store.meta() or {}, made.labels)
        assert opened is not None
        return opened

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)


def _recorded(batches: Iterable[Batch], labels: list[torch.Tensor], samples: list[int]) -> Iterator[Batch]:
    """The batches, while their labels and samples are written down."""
    for batch in batches:
        # Fetching them from a device would wait for all that is queued there. Who made them may use the memory again.
        labels.append(batch.targets if batch.targets.device.type == "cpu" else batch.targets.clone())
        samples.extend(batch.samples or [])
        yield batch


def _joined(labels: list[torch.Tensor]) -> torch.Tensor:
    """Of all batches, on the CPU; one copy where they are on one device."""
    if len({part.device for part in labels}) > 1:
        labels = [part.cpu() for part in labels]
    return torch.cat(labels).cpu()


def _cut(samples: list[int], size: int) -> list[list[int]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return [list(one) if isinstance(one, tuple) else one for one in value] if isinstance(value, list) else value


# -- the key: everything that shapes the numbers, besides the images -----------------------------------------

_WORDS = {
    "transform": "the transform changed",
    "model": "the model or its weights changed",
    "engine": "another engine is asked for, which rounds differently",
    "precision": "another precision is asked for",
    "calibration": "the first images, on which the ranges for int8 were found, are others",
    "dtype": "another dtype is asked for",
    "seed": "another seed is asked for",
    "versions": "another version of torch, torchvision, timm, Pillow or cnnrs computes them",
}


def _versions(model: nn.Module) -> str:
    """Of the packages whose code the other parts of the key take for granted."""
    import PIL
    import torchvision

    found = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Pillow": PIL.__version__,
        "cnnrs": __version__,
    }
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        found["timm"] = sys.modules["timm"].__version__
    return ", ".join(f"{name} {version}" for name, version in found.items())
