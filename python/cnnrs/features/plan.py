"""The rows that a store shall have, and what identifies each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch

from cnnrs.engine.memory_order import Order
from cnnrs.features.calibration import Ranges
from cnnrs.features.samples import Data, Stat, elsewhere, unchanged

#: Of an image that cannot be read, or changed while its features were computed: equal to nothing.
UNKNOWN = ""


@dataclass
class Plan:
    """The rows a store shall have: every sample once per pass, pass by pass.

    Attributes:
        data: where the images come from.
        settings: everything besides the images that shapes the numbers.
        passes: how many times every image is augmented and computed.
        seed: of the augmentation.
        batch_size: images at a time.
        skipped: samples that are left out, and why.
        random: why the rows are draws of a random generator, "" while nothing says that they are.
        network: what the model is called.
        order: in which order of memory the model got the batches of the rows that are there; None where there are none.
        calibration: what int8 layers read in the rows that are there; None where nothing says so.
        shown: how many of the first images decide about numbers that are not theirs.
    """

    data: Data
    settings: dict[str, str]
    passes: int
    seed: int
    batch_size: int
    samples: list[int] = field(init=False)
    stats: list[Stat] | None = field(init=False)
    skipped: dict[int, str] = field(default_factory=dict)
    random: str = ""
    network: str = ""
    order: Order | None = None
    calibration: Ranges | None = None
    shown: int = 0

    def __post_init__(self) -> None:
        self.samples = list(range(len(self.data)))
        self.stats = self.data.stats()
        self._identities: dict[int, str] = {}

    @cached_property
    def key(self) -> dict[str, str]:
        """The settings, and a hash of the images that decide about all numbers."""
        if not self.shown:
            return self.settings
        images = [self.identity(sample) for sample in range(min(self.shown, len(self.data)))]
        digest = blake2b(json.dumps([self.shown, images]).encode(), digest_size=12)
        return {**self.settings, "calibration": digest.hexdigest()}

    @property
    def rows(self) -> int:
        """Rows of the finished store."""
        return len(self.samples) * self.passes

    def skip(self, faults: dict[str, str]) -> int:
        """Leave out files that cannot be read; returns how many samples that are."""
        files = self.data.files or []
        gone = {i: faults[files[i]] for i in self.samples if files and files[i] in faults}
        self.skipped.update(gone)
        self.samples = [i for i in self.samples if i not in gone]
        return len(gone)

    def faults(self) -> dict[str, str]:
        """The files that are left out, and why."""
        files = self.data.files or []
        return {files[i]: reason for i, reason in self.skipped.items()}

    def skip_again(self, meta: dict[str, Any]) -> None:
        """Leave out files that could not be decoded before and have not changed since, or still cannot be read."""
        places = {path: i for i, path in enumerate(self.data.files or [])}
        faults: dict[str, str] = {}
        passing: set[str] = set()
        # What was over a limit may not be over another one.
        same_limits = meta.get("limits") == self.data.limits
        for path, reason, stat in meta["skipped"]:
            sample = places.get(path)
            if sample is None or self.stats is None:
                continue
            if stat is not None and same_limits and tuple(stat) == self.stats[sample]:
                faults[path] = reason
            elif stat is None and (still := self._unreadable(sample)):
                faults[path] = still
                passing.add(path)
        self.skip(faults)
        self.data.leave_out(faults, passing)

    def _unreadable(self, sample: int) -> str:
        """Why the bytes of a file cannot be had, "" when they can."""
        try:
            self._identities[sample] = self.data.identity(sample)
        except OSError as error:
            return str(error)
        return ""

    def digest(self, anywhere: bool = False) -> str:
        """Of everything that decides which numbers belong in which row; `anywhere`: on any machine with these files."""
        files = self.data.files
        what: list[Any] = [self.key, self.passes]
        if files is not None and self.stats is not None:
            what.append([(files[i], *(elsewhere(self.stats[i]) if anywhere else self.stats[i])) for i in self.samples])
        else:
            what.append([self.identity(i) for i in self.samples])
        return blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()

    def know(self, meta: dict[str, Any]) -> None:
        """Take over what a store of the same key says."""
        self.random = meta.get("random", "") or self.random
        self.order = meta.get("order", "contiguous")
        self.calibration = meta.get("calibration")

    def know_files(self, meta: dict[str, Any]) -> None:
        """Take over the identities of files that nothing says have been written, replaced or moved since.

        Size and time alone do not: they can be set, and a camera's files may have them in common.
        """
        if self.stats is None or self.data.files is None or not meta.get("stats"):
            return
        known = {
            path: (tuple(stat), one)
            for path, stat, one in zip(meta["paths"], meta["stats"], meta["ids"], strict=False)
            if one != UNKNOWN
        }
        for i in self.samples:
            stat, one = known.get(self.data.files[i], ((), UNKNOWN))
            if stat == self.stats[i]:
                self._identities[i] = one

    def identity(self, sample: int) -> str:
        """The hash of an image's contents; "" when it cannot be read."""
        if sample not in self._identities:
            try:
                self._identities[sample] = self.data.identity(sample)
            except OSError:
                return UNKNOWN
        return self._identities[sample]

    def places(self) -> dict[int, int]:
        """Sample -> its row within a pass."""
        return {sample: at for at, sample in enumerate(self.samples)}

    def identify(self, samples: list[int]) -> list[str]:
        """The identities of images that were just read; unknown for those that have changed since the plan was made."""
        found = []
        for i in samples:
            one = self.identity(i)
            files, stats = self.data.files, self.stats
            if files is not None and stats is not None and not unchanged(files[i], stats[i]):
                one = UNKNOWN
            found.append(one)
        return found

    def is_of(self, meta: dict[str, Any]) -> bool:
        """Whether a store has exactly the rows of this plan."""
        ids = meta["ids"]
        return (
            len(ids) == self.rows and meta["passes"] == self.passes and UNKNOWN not in ids and ids == self.identities()
        )

    def identities(self) -> list[str]:
        """Of every row, in order."""
        # Photos that were copied or touched are read for it, all of them. Images in memory gain nothing from threads.
        if self.stats is not None and (unread := [i for i in self.samples if i not in self._identities]):
            with ThreadPoolExecutor(thread_name_prefix="cnnrs-identity") as pool:
                list(pool.map(self.identity, unread))
        return [self.identity(i) for i in self.samples] * self.passes

    def meta(self, ids: Sequence[str]) -> dict[str, Any]:
        """What `meta.json` says about the rows."""
        files, stats = self.data.files, self.stats
        return {
            "paths": None if files is None else [files[i] for i in self.samples] * self.passes,
            "classes": self.data.classes,
            "passes": self.passes,
            "key": self.key,
            "network": self.network,
            "stats": None if stats is None else [stats[i] for i in self.samples],
            "ids": list(ids),
            # Without the file's state where the reason may be gone although the file is the same.
            "skipped": [
                [files[i], reason, None if self.data.may_pass(files[i]) else stats[i]]
                for i, reason in sorted(self.skipped.items())
            ]
            if files and stats
            else [],
            **({"limits": self.data.limits} if self.skipped else {}),
            **({"random": self.random} if self.random else {}),
            **({"order": self.order} if self.order == "channels_last" else {}),
            **({"calibration": self.calibration} if self.calibration else {}),
        }

    def labels(self) -> torch.Tensor:
        """Of every row, in order."""
        once = self.data.labels(self.samples)
        return once.repeat(self.passes, *[1] * (once.dim() - 1))
