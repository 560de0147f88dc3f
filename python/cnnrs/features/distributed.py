"""One store from several processes of `torchrun`: each computes its share of the missing rows into the same file."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from cnnrs.features.features import Features
from cnnrs.features.plan import Plan
from cnnrs.features.session import Session
from cnnrs.features.store import Store
from cnnrs.features.update import File, Update


def is_shared(loader: Any) -> bool:
    """Whether the loader is one of several that share its samples.

    Raises:
        ValueError: it is, but there is no process group to agree through.
    """
    if not isinstance(getattr(loader, "sampler", None), DistributedSampler) or loader.sampler.num_replicas == 1:
        return False
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "a loader with rank and world_size needs a process group to share a folder: start with torchrun and call "
            'torch.distributed.init_process_group("gloo") (or "nccl") first'
        )
    return True


def in_folder(session: Session, store: Store, passes: int, seed: int) -> Features:
    """The store of one process, computed by all of them; every process calls this and gets all features.

    The folder must be the same one for all. Rank 0 plans, keeps the books and talks.

    Raises:
        ValueError: the processes do not see the same images, model or options.
        RuntimeError: another process failed; says which, and with what.
    """
    if session.unidentified:
        raise ValueError(f"processes can share a folder only for images that can be compared: {session.unidentified}")
    ranks = _Ranks(session, store)
    return ranks.lead(passes, seed) if ranks.rank == 0 else ranks.follow(session.plan(passes, seed))


class _Ranks:
    """Messages between the processes: rank 0 says what to compute until it says that all is done."""

    def __init__(self, session: Session, store: Store) -> None:
        self.session = session
        self.store = store
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Not the user's group: NCCL's cannot carry objects without a GPU of its own.
        self.group: Any = dist.new_group(backend="gloo")

    def lead(self, passes: int, seed: int) -> Features:
        self.session.computes = self._share_out
        end: tuple[str, Any] = ("stop", "rank 0 failed")
        try:
            features = self.session.in_folder(self.store, passes, seed)
            end = ("done", None)
            return features
        except Exception as error:
            end = ("stop", f"rank 0: {type(error).__name__}: {error}")
            raise
        finally:
            self._tell(end)

    def follow(self, plan: Plan) -> Features:
        self.session.verbose = False
        while True:
            kind, value = self._tell(None)
            if kind == "stop":
                raise RuntimeError(value)
            if kind == "done":
                break
            faults, missing, digest, plan.order, plan.calibration = value
            plan.skip(faults)
            self._collect(self._try(plan, missing, digest))
        found = self.session.opened(self.store, plan)
        if found is None:
            raise RuntimeError(f"{self.store.folder} is not what rank 0 has written: it must be the same for all ranks")
        return found

    def _share_out(self, update: Update, file: File) -> None:
        """Rank 0's part of one computation."""
        plan = update.plan
        # Each clock might choose another one.
        plan.order = plan.order or "contiguous"
        # Nor would each need a look of its own.
        self.session.calibrate(update)
        work = plan.faults(), update.missing, plan.digest(anywhere=True), plan.order, plan.calibration
        self._tell(("compute", work))
        failures = self._collect(self._try(plan, update.missing, plan.digest(anywhere=True)))
        self.store.absorb()
        if failures:
            raise RuntimeError("; ".join(failures))

    def _try(self, plan: Plan, missing: list[list[int]], digest: str) -> str | None:
        """Compute this process's share; what went wrong, in words."""
        if plan.digest(anywhere=True) != digest:
            return f"rank {self.rank} sees other images, another model or other options than rank 0"
        update = Update(self.store, plan, lambda *_: None, lambda _: None)
        update.missing, update.share = missing, (self.rank, self.size)
        try:
            if any(True for _ in update.shares()):
                self.session.compute(update, update.file(self.store.shared_journal(self.rank)))
        except Exception as error:
            return f"rank {self.rank}: {type(error).__name__}: {error}"
        return None

    def _tell(self, message: tuple[str, Any] | None) -> tuple[str, Any]:
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.group)
        assert box[0] is not None
        return box[0]

    def _collect(self, failure: str | None) -> list[str]:
        """What went wrong anywhere; also passes on which files could not be read."""
        loader: Any = self.session.data.data
        faults = self.session.data.faults
        mine = failure, list(getattr(loader, "errors", [])), set() if faults is None else faults.passing
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        if hasattr(loader, "errors"):
            known = {path for path, _ in loader.errors}
            loader.errors.extend(one for _, errors, _ in everyone for one in errors if one[0] not in known)
        if faults is not None:
            faults.passing.update(*(passing for _, _, passing in everyone))
        return [failure for failure, _, _ in everyone if failure is not None]
