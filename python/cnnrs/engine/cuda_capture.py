"""A piece of work as a CUDA graph: recorded once on a stream of its own, launched as often as wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from cnnrs._util.streams import side_stream

Work = Callable[[], None]
Launch = Callable[[], None]


def stream_of(device: torch.device) -> Any:
    """The stream on which steps of a device run before they are recorded, and are recorded; None for a CPU.

    One for the whole process: memory that was freed on a stream is used again by that stream only.
    """
    return side_stream(device, "recordings") if device.type == "cuda" else None


def _record(work: Work, stream: Any) -> Launch:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # Also where the end of a recording fails, which in several versions leaves its stream the current one.
    with torch.cuda.stream(stream):
        try:
            # Other threads, a loader's for one, may allocate meanwhile: only what this thread does must fit in.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            _leave(stream.device, pool)
            raise
    return graph.replay


#: Per type of device: takes a step's work and a stream, computes nothing, returns what computes it as often as called.
RECORDERS: dict[str, Callable[[Work, Any], Launch]] = {"cuda": _record}


def why(error: Exception, outside: BaseException | None) -> str:
    """What ended a recording, in one line: CUDA's own error about its end hides that.

    Args:
        error: what the recorder has raised.
        outside: what the caller was handling before.

    Raises:
        BaseException: what ended it was no ``Exception``, but Ctrl-C for example.
    """
    reason: BaseException = error
    while reason.__context__ not in (None, outside):
        reason = reason.__context__
    if not isinstance(reason, Exception):
        raise reason from None
    line = str(reason).split("\n")[0]
    return f"{type(reason).__name__}: {line}"


#: How often generators were replaced, per device.
_replaced: Counter[torch.device] = Counter()


def generation(device: torch.device) -> int:
    """Another number: what was recorded before draws from a generator that nobody seeds any more."""
    return _replaced[device]


def _leave(device: torch.device, pool: Any) -> None:
    """Take allocator and generator out of a recording that went wrong; the end that failed may have left them in it."""
    extension: Any = torch._C
    end = getattr(extension, "_cuda_endAllocateToPool", None) or extension._cuda_endAllocateCurrentStreamToPool
    # It says so where it is out already.
    with suppress(RuntimeError):
        end(device.index, pool)
        extension._cuda_releasePool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    try:
        _draw(device)
        generator.set_state(state)
    except RuntimeError:
        # "Offset increment outside graph capture": every draw would raise from now on.
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        _replaced[device] += 1


def _draw(device: torch.device) -> None:
    torch.empty(1, device=device).uniform_()
