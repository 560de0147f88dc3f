"""Bring a store up to date: keep the rows whose images are the same, compute the others."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cnnrs import _cnnrs
from cnnrs._records import RowFile
from cnnrs.engine.memory_order import Order
from cnnrs.features.calibration import Ranges
from cnnrs.features.npy import Layout
from cnnrs.features.plan import UNKNOWN, Plan
from cnnrs.features.samples import Batch
from cnnrs.features.store import Store, good_rows

#: (inputs, runs of rows, identities of the rows): what an extractor reads.
Item = tuple[torch.Tensor, list[tuple[int, int]], list[str]]
#: Where an extractor writes.
File = RowFile
Compute = Callable[["Update", File], object]

# Rows that are copied at a time.
_COPY_BYTES = 8 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
                if not self.keep(meta):
                    self.run(meta)
                return
            layout = self.store.partial_layout()
            assert layout is not None
            self.store.commit(layout, self.plan.labels(), self.plan.meta(self._ids()))
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            raise

    def keep(self, meta: dict[str, Any] | None) -> bool:
        """Leave the rows of a complete store as they are, if they are the plan's: what else it says may change."""
        if meta is None or not self.plan.is_of(meta) or not self.store.is_whole(meta):
            return False
        self.store.discard()
        self.store.commit(self.store.layout(meta), self.plan.labels(), self.plan.meta(meta["ids"]))
        return True

    # -- what is there ---------------------------------------------------------------------------------------

    def _resume(self) -> dict[int, str]:
        """Row -> identity of what an interrupted run of the same plan has left; begins a new file if there is none."""
        digest = self.plan.digest()
        self.store.absorb()
        journal, layout = self.store.journal(), self.store.partial_layout()
        if journal is not None and journal.header.get("key") == self.plan.key:
            # Rows that are taken over decide for those to come.
            self.plan.order = journal.header.get("order", "contiguous" if journal.runs else self.plan.order)
            self.plan.calibration = journal.header.get("calibration", self.plan.calibration)
        if journal is not None and journal.header.get("plan") == digest:
            if layout is not None and layout.shape[0] == self.plan.rows:
                return good_rows(self.store.path("features.npy.partial"), layout, journal.runs)
            if layout is None and not journal.runs:
                # What is there of the file cannot be gone on with.
                self.store.drop_rows()
                return {}
        plan = self.plan
        more: dict[str, Any] = {} if plan.order is None else {"order": plan.order}
        if plan.calibration is not None:
            more["calibration"] = plan.calibration
        self.store.start({"key": plan.key, "plan": digest, "passes": plan.passes, "network": plan.network, **more})
        return {}

    def keep_order(self, order: Order) -> None:
        """Write down what the clock has chosen, before there are rows of it: whoever goes on computes in the same."""
        self.plan.order = order
        self.store.note({"order": order})

    def keep_calibration(self, ranges: Ranges) -> None:
        """Write down what int8 layers read, before there are rows of it."""
        self.plan.calibration = ranges
        self.store.note({"calibration": ranges})

    def _sources(self, meta: dict[str, Any] | None) -> list[_Source]:
        """Where rows with the same key may be."""
        sources = [self._complete(meta)] if meta is not None else []
        name = "features.npy.previous"
        layout, journal = self.store.partial_layout(name), self.store.journal("features.journal.previous")
        # Of another size it may have lost rows, or its header says another number of them than there are.
        whole = layout is not None and self.store.path(name).stat().st_size == layout.file_bytes
        if layout is not None and whole and journal is not None and journal.header.get("key") == self.plan.key:
            each = layout.shape[0] // journal.header["passes"]
            good = good_rows(self.store.path(name), layout, journal.runs)
            rows = {(one, row // each): row for row, one in good.items() if one != UNKNOWN}
            sources.append(_Source(self.store.path(name), layout, rows))
        return [source for source in sources if source.rows]

    def _complete(self, meta: dict[str, Any]) -> _Source:
        layout = self.store.layout(meta)
        bad = {row for start, count in self.store.damaged(meta) for row in range(start, start + count)}
        each = layout.shape[0] // meta["passes"]
        rows = {(one, row // each): row for row, one in enumerate(meta["ids"]) if row not in bad and one != UNKNOWN}
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
                (old, new, count, identities[new : new + count])
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
        rows = self.store.path("features.npy.partial")
        return {"path": rows, "journal": journal, "total": self.plan.rows, "resume": there}

    def _ids(self) -> list[str]:
        journal = self.store.journal()
        ids: list[str | None] = [None] * self.plan.rows
        for start, count, _, names in journal.runs if journal is not None else ():
            ids[start : start + count] = names
        if holes := ids.count(None):
            raise OSError(
                f"{self.store.folder}: {holes} of {self.plan.rows} rows were not computed, although nothing failed: "
                "is something else writing there?"
            )
        return [one or UNKNOWN for one in ids]

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
        # Beside the model, out of the system's cache. Were it done by the loader's threads, over what they have read,
        # that would save the second reading, not the hash: 17 of 48 us per photo of 23 KB, and of 2,300 us in all
        # where the model only averages. What changes in between is seen by `identify`.
        threads = _cnnrs.available_threads()
        with ThreadPoolExecutor(threads, thread_name_prefix="cnnrs-identity") as pool:
            for number, batches in self.shares():
                waiting: tuple[Batch, list[Future[list[str]]]] | None = None
                for batch in self.plan.data.batches(batches, self.plan.seed, number, self.plan.rows - self.count):
                    now = batch, [pool.submit(self.plan.identify, part) for part in _parts(batch.samples, threads)]
                    if waiting is not None:
                        yield self._item(*waiting, number, place)
                    waiting = now
                if waiting is not None:
                    yield self._item(*waiting, number, place)

    def _item(self, batch: Batch, identities: list[Future[list[str]]], number: int, place: dict[int, int]) -> Item:
        rows = [number * len(place) + place[sample] for sample in batch.samples or []]
        return batch.inputs, runs_of(rows), [one for part in identities for one in part.result()]

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


def placed(batches: Iterable[Batch]) -> Iterator[Item]:
    """Batches whose rows go behind those of the batch before: one row per image, or it is an error."""
    at = 0
    for batch in batches:
        yield batch.inputs, [(at, len(batch.inputs))], []
        at += len(batch.inputs)


def runs_of(rows: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, how many)."""
    groups = [list(group) for _, group in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
    return [(group[0][1], len(group)) for group in groups]


def _parts(samples: list[int] | None, most: int) -> list[list[int]]:
    """For several threads; not so small that handing them over is the work."""
    samples = samples or []
    size = max(16, -(-len(samples) // most))
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _joined(pairs: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int, int]]:
    """(old row, new row) pairs as runs of at most `most` rows."""
    start = 0
    for i in range(1, len(pairs) + 1):
        follows = i < len(pairs) and pairs[i][0] - pairs[i - 1][0] == 1 == pairs[i][1] - pairs[i - 1][1]
        if not follows or i - start == most:
            yield (*pairs[start], i - start)
            start = i
