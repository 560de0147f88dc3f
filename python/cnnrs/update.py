"""Bring a store up to date: keep the rows whose images are the same, compute the others."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cnnrs import _cnnrs
from cnnrs.rows import Batch, Data, Stat, unchanged
from cnnrs.store import Layout, Store, good_rows

#: (inputs, runs of rows, what the commit record says): what an extractor reads.
Item = tuple[torch.Tensor, list[tuple[int, int]], str]
#: (path, journal, rows in all, whether the file is there): where an extractor writes.
File = tuple[str, str | None, int | None, bool]
Compute = Callable[["Update", File], object]

# Of an image that cannot be read, or changed while its features were computed: equal to nothing.
_UNKNOWN = ""
# Rows that are copied at a time.
_COPY_BYTES = 8 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Plan:
    """The rows a store shall have: every sample once per pass, pass by pass.

    Attributes:
        data: where the images come from.
        key: everything besides the images that shapes the numbers.
        passes: how many times every image is augmented and computed.
        seed: of the augmentation.
        batch_size: images at a time.
    """

    data: Data
    key: dict[str, str]
    passes: int
    seed: int
    batch_size: int
    samples: list[int] = field(init=False)
    stats: list[Stat] | None = field(init=False)
    skipped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samples = list(range(len(self.data)))
        self.stats = self.data.stats()
        self._identities: dict[int, str] = {}

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
        """Leave out files that could not be read before and have not changed since."""
        now = dict(zip(self.data.files or [], self.stats or [], strict=False))
        self.skip({path: reason for path, reason, stat in meta["skipped"] if now.get(path) == tuple(stat)})

    def digest(self) -> str:
        """Of everything that decides which numbers belong in which row."""
        files = self.data.files
        what: list[Any] = [self.key, self.passes]
        if files is not None and self.stats is not None:
            what.append([(files[i], *self.stats[i]) for i in self.samples])
        else:
            what.append([self.identity(i) for i in self.samples])
        return blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()

    def know(self, meta: dict[str, Any]) -> None:
        """Take over the identities of files that have neither another size nor another time."""
        if self.stats is None or self.data.files is None or not meta.get("stats"):
            return
        known = {
            path: (tuple(stat), one)
            for path, stat, one in zip(meta["paths"], meta["stats"], meta["ids"], strict=False)
            if one != _UNKNOWN
        }
        for i in self.samples:
            stat, one = known.get(self.data.files[i], ((), _UNKNOWN))
            if stat == self.stats[i]:
                self._identities[i] = one

    def identity(self, sample: int) -> str:
        """The hash of an image's contents; "" when it cannot be read."""
        if sample not in self._identities:
            try:
                self._identities[sample] = self.data.identity(sample)
            except OSError:
                return _UNKNOWN
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
                one = _UNKNOWN
            found.append(one)
        return found

    def is_of(self, meta: dict[str, Any]) -> bool:
        """Whether a store has exactly the rows of this plan."""
        ids = meta["ids"]
        return (
            len(ids) == self.rows and meta["passes"] == self.passes and _UNKNOWN not in ids and ids == self.identities()
        )

    def identities(self) -> list[str]:
        """Of every row, in order."""
        return [self.identity(i) for i in self.samples] * self.passes

    def meta(self, ids: Sequence[str]) -> dict[str, Any]:
        """What `meta.json` says about the rows."""
        files, stats = self.data.files, self.stats
        return {
            "paths": None if files is None else [files[i] for i in self.samples] * self.passes,
            "classes": self.data.classes,
            "passes": self.passes,
            "key": self.key,
            "stats": None if stats is None else [stats[i] for i in self.samples],
            "ids": list(ids),
            "skipped": [[files[i], reason, stats[i]] for i, reason in sorted(self.skipped.items())]
            if files and stats
            else [],
        }

    def labels(self) -> torch.Tensor:
        """Of every row, in order."""
        once = self.data.labels(self.samples)
        return once.repeat(self.passes, *[1] * (once.dim() - 1))


@dataclass
class _Source:
    """Rows that are there: in which file, and (identity, pass) -> row."""

    path: Path
    layout: Layout
    rows: dict[tuple[str, int], int]


class Update:
    """One run of `preconv` on a locked store.

    Args:
        store: the folder.
        plan: what it shall hold.
        compute: runs the model over what is `missing` and writes the rows.
        say: told in one line what is kept and what is computed, when something is kept.

    Attributes:
        missing: for every pass, the samples to be computed.
        share: (which, of how many): the batches that this process computes, every n-th.
    """

    def __init__(self, store: Store, plan: Plan, compute: Compute, say: Callable[[str], None]) -> None:
        self.store = store
        self.plan = plan
        self.compute = compute
        self.say = say
        self.missing: list[list[int]] = []
        self.share = (0, 1)

    def run(self, meta: dict[str, Any] | None) -> None:
        """Make the store hold exactly the plan's rows; `meta` is that of a complete store with the same key.

        Raises:
            OSError: the disk is full; says how much is safe.
        """
        if not self.plan.rows:
            raise ValueError("no samples: there are no features to compute")
        try:
            done = self._resume()
            self._copy(self._sources(meta), done)
            if done:
                self.say(
                    f"{_difference(meta, self.plan)}computing {self.plan.rows - len(done)} rows, {len(done)} are there"
                )
            self._compute_missing(done)
            # Files that cannot be read left holes: with a plan without them all other rows are copied.
            if self.plan.skip(self._faults()):
                self.run(meta)
                return
            layout = self.store.partial_layout()
            assert layout is not None
            self.store.commit(layout, self.plan.labels(), self.plan.meta(self._ids()))
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            raise

    # -- what is there ---------------------------------------------------------------------------------------

    def _resume(self) -> dict[int, str]:
        """Row -> identity of what an interrupted run of the same plan has left; begins a new file if there is none."""
        digest = self.plan.digest()
        self.store.absorb()
        journal, layout = self.store.journal(), self.store.partial_layout()
        if journal is not None and journal.header.get("plan") == digest:
            if layout is not None and layout.shape[0] == self.plan.rows:
                return good_rows(self.store.path("features.npy.partial"), layout, journal.runs)
            if layout is None and not journal.runs:
                return {}
        self.store.start({"key": self.plan.key, "plan": digest, "passes": self.plan.passes})
        return {}

    def _sources(self, meta: dict[str, Any] | None) -> list[_Source]:
        """Where rows with the same key may be."""
        sources = [self._complete(meta)] if meta is not None else []
        name = "features.npy.previous"
        layout, journal = self.store.partial_layout(name), self.store.journal("features.journal.previous")
        if layout is not None and journal is not None and journal.header.get("key") == self.plan.key:
            each = layout.shape[0] // journal.header["passes"]
            good = good_rows(self.store.path(name), layout, journal.runs)
            rows = {(one, row // each): row for row, one in good.items() if one != _UNKNOWN}
            sources.append(_Source(self.store.path(name), layout, rows))
        return [source for source in sources if source.rows]

    def _complete(self, meta: dict[str, Any]) -> _Source:
        layout = self.store.layout(meta)
        bad = {row for start, count in self.store.damaged(meta) for row in range(start, start + count)}
        each = layout.shape[0] // meta["passes"]
        rows = {(one, row // each): row for row, one in enumerate(meta["ids"]) if row not in bad and one != _UNKNOWN}
        return _Source(self.store.path("features.npy"), layout, rows)

    def _copy(self, sources: list[_Source], done: dict[int, str]) -> None:
        """Copy the rows whose images are the same, and count them as done."""
        if not sources or len(done) == self.plan.rows:
            return
        identities, each = self.plan.identities(), len(self.plan.samples)
        for source in sources:
            there, layout = self.store.partial_layout(), source.layout
            if there is not None and (there.shape[1:], there.dtype) != (layout.shape[1:], layout.dtype):
                continue
            pairs = [
                (source.rows[identities[row], row // each], row)
                for row in range(self.plan.rows)
                if row not in done and (identities[row], row // each) in source.rows
            ]
            moves = [
                (old, new, count, json.dumps(identities[new : new + count]))
                for old, new, count in _joined(pairs, max(1, _COPY_BYTES // max(layout.row_bytes, 1)))
            ]
            if moves:
                _cnnrs.copy_rows(source.path, self.file(), list(layout.shape[1:]), layout.dtype, moves)
                done.update((row, identities[row]) for _, row in pairs)

    def file(self, journal: Path | None = None) -> File:
        """Where rows go, and the journal that says so."""
        journal = journal if journal is not None else self.store.path("features.journal")
        # A file that others may be writing to is never made anew.
        there = self.share[1] > 1 or self.store.partial_layout() is not None
        return os.fspath(self.store.path("features.npy.partial")), os.fspath(journal), self.plan.rows, there

    def _ids(self) -> list[str]:
        journal = self.store.journal()
        assert journal is not None
        ids = [_UNKNOWN] * self.plan.rows
        for start, count, _, names in journal.runs:
            ids[start : start + count] = names
        return ids

    # -- what is missing -------------------------------------------------------------------------------------

    def _compute_missing(self, done: dict[int, str]) -> None:
        each = len(self.plan.samples)
        self.missing = [
            [sample for at, sample in enumerate(self.plan.samples) if number * each + at not in done]
            for number in range(self.plan.passes)
        ]
        if any(self.missing):
            self.compute(self, self.file())

    def shares(self) -> Iterator[tuple[int, list[list[int]]]]:
        """This process's batches of samples, for every pass that has any."""
        size, (mine, all_of_them) = self.plan.batch_size, self.share
        for number, samples in enumerate(self.missing):
            batches = [samples[i : i + size] for i in range(0, len(samples), size)][mine::all_of_them]
            if batches:
                yield number, batches

    @property
    def count(self) -> int:
        """How many rows this process computes."""
        return sum(len(batch) for _, batches in self.shares() for batch in batches)

    def items(self) -> Iterator[Item]:
        """What is missing, read by this process."""
        place = self.plan.places()
        # Beside the model: hashing a file takes about as long as reading it once more.
        with ThreadPoolExecutor(1, thread_name_prefix="cnnrs-identity") as pool:
            for number, batches in self.shares():
                waiting: tuple[Batch, Future[list[str]]] | None = None
                for batch in self.plan.data.batches(batches, self.plan.seed, number):
                    now = batch, pool.submit(self.plan.identify, batch.samples or [])
                    if waiting is not None:
                        yield self._item(*waiting, number, place)
                    waiting = now
                if waiting is not None:
                    yield self._item(*waiting, number, place)

    def _item(self, batch: Batch, identities: Future[list[str]], number: int, place: dict[int, int]) -> Item:
        rows = [number * len(place) + place[sample] for sample in batch.samples or []]
        return batch.inputs, runs_of(rows), json.dumps(identities.result())

    def _faults(self) -> dict[str, str]:
        loader: Any = self.plan.data.data
        if getattr(loader, "on_error", "raise") != "skip" or self.plan.data.files is None:
            return {}
        faults = dict(loader.errors)
        return faults if any(self.plan.data.files[i] in faults for i in self.plan.samples) else {}

    def _full(self, error: OSError) -> OSError:
        journal = self.store.journal()
        safe = sum(count for _, count, _, _ in journal.runs) if journal is not None else 0
        layout = self.store.partial_layout()
        need = f"; the whole file takes {layout.row_bytes * layout.shape[0] / 2**20:,.0f} MiB" if layout else ""
        return OSError(
            error.errno,
            f"{error.strerror}: {safe} of {self.plan.rows} rows are safe{need}. Make room and call preconv again: it "
            "computes only the missing rows",
            error.filename,
        )


def _difference(meta: dict[str, Any] | None, plan: Plan) -> str:
    """How the images differ from those of a complete store, in words."""
    if meta is None:
        return ""
    before, now = set(meta["ids"]), set(plan.identities())
    parts = [(len(now - before), "new or changed"), (len(before - now), "gone")]
    words = " and ".join(
        f"{count} {'image is' if count == 1 else 'images are'} {what}" for count, what in parts if count
    )
    return f"{words}: " if words else ""


def runs_of(rows: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, how many)."""
    groups = [list(group) for _, group in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
    return [(group[0][1], len(group)) for group in groups]


def _joined(pairs: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    """(old row, new row) pairs as runs of at most `most` rows."""
    start = 0
    for i in range(1, len(pairs) + 1):
        follows = i < len(pairs) and pairs[i][0] - pairs[i - 1][0] == 1 == pairs[i][1] - pairs[i - 1][1]
        if not follows or i - start == most:
            yield (*pairs[start], i - start)
            start = i
