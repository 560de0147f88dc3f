"""Where the time of one training step goes with native kernels, by kind of operation."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from fit_cases import Case
from fit_costs import products
from measure import show
from torch.profiler import ProfilerActivity, profile, record_function

from cnnrs import _cnnrs
from cnnrs._util.kept_memory import kept_memory
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import Lowered, lower

#: What is computed, which part of it, and by whom.
Kind = tuple[str, str, str]
NATIVE, EAGER = "native", "PyTorch"
THREE, ONE, DEPTHWISE, OTHER = "3 x 3, stride 1", "1 x 1", "depthwise", "other convolutions"
NORM, GATE = "batch norm, sum, activation", "squeeze and excitation"
LINEAR, UPDATE, REST = "linear layers", "update", "rest"
FORWARD, INPUT, WEIGHT, BOTH = "forward", "input gradient", "weight gradient", "both gradients"
ORDER = [THREE, ONE, DEPTHWISE, OTHER, NORM, GATE, LINEAR, UPDATE]
PARTS = [FORWARD, INPUT, WEIGHT, BOTH, "backward", ""]
#: The beginnings of the names of native kernels.
KERNELS = {
    "conv3x3": THREE, "conv1x1": ONE, "depthwise": DEPTHWISE, "squeeze": GATE, "batch_norm": NORM, "moments": NORM,
    "finish": NORM,
}  # fmt: skip
STEP = "whole step"


class Profile:
    """Some steps of each network under PyTorch's profiler."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases

    def measure(self) -> "Profile":
        """Native kernels everywhere, whether they are faster here or not."""
        self.peak = products()
        self.found = []
        for case in self.cases:
            self.found.append((case, *_profiled(case)))
            print(f"Profile: {case.name}", file=sys.stderr, flush=True)
        return self

    def table(self) -> str:
        """A table for each network."""
        return "\n".join(
            [
                "### Training: where a step with native kernels goes",
                "",
                "By PyTorch's profiler, mean of the steps; native kernels are used whether they are faster here or "
                "not. GFLOP: what the direct algorithm takes; share of the machine: of "
                f"{show(self.peak / 1e9)} GFLOP/s, PyTorch's product of two 2048 x 2048 matrices here. Winograd's "
                "algorithm takes a quarter of the products, so it may exceed 100 %. PyTorch computes both gradients of "
                "a convolution in one operation; native 1 x 1 and depthwise convolutions do, too, and have the batch "
                "norms around them in their time. Of the rest, the operations that take most.",
                "",
                *(line for found in self.found for line in self._lines(*found)),
            ]
        )

    def _lines(self, case: Case, seconds: dict[Kind, float], work: dict[Kind, float]) -> Iterator[str]:
        whole = seconds.pop((STEP, "", ""))
        seconds = _largest_of_the_rest(seconds)
        yield f"{case.name}: {show(1e3 * whole)} ms, n = {case.steps} steps."
        yield ""
        yield "| what | part | by | ms | share of the step | GFLOP | share of the machine |"
        yield "|---|---|---|---:|---:|---:|---:|"
        rest = whole - sum(seconds.values())
        known = sorted(seconds, key=_place)
        for kind, took in [*((kind, seconds[kind]) for kind in known), ((REST, "all else", EAGER), rest)]:
            flops = work.get(kind, 0.0)
            arithmetic = f"{show(flops / 1e9)} | {100 * flops / took / self.peak:.0f} %" if flops else "|"
            yield f"| {' | '.join(kind)} | {show(1e3 * took)} | {100 * took / whole:.1f} % | {arithmetic} |"
        yield ""


def _largest_of_the_rest(seconds: dict[Kind, float], most: int = 4) -> dict[Kind, float]:
    """Without all but some of the operations that are of no kind."""
    named = sorted((kind for kind in seconds if kind[0] == REST), key=seconds.__getitem__, reverse=True)
    return {kind: took for kind, took in seconds.items() if kind not in named[most:]}


def _place(kind: Kind) -> tuple[int, int]:
    what, part, _ = kind
    # Kernels that this file does not know come in front of the rest.
    return ORDER.index(what) if what in ORDER else len(ORDER) + (what == REST), PARTS.index(
        part
    ) if part in PARTS else 0


def _profiled(case: Case) -> tuple[dict[Kind, float], dict[Kind, float]]:
    """Seconds of a step by kind, the whole step among them, and the operations on numbers that these take."""
    torch.manual_seed(0)
    model = case.make().train()
    optimizer = case.optimizer(model)
    lowered = lower(model, True)
    batches = case.batches()
    with _named_kernels(), kept_memory():
        kernels = Kernels(lowered)

        def step(images: torch.Tensor, targets: torch.Tensor) -> None:
            optimizer.zero_grad()
            loss = case.loss_fn(kernels.play(lowered, lowered.tensors, images), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        for batch in batches[:2]:
            step(*batch)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for batch in batches:
                with record_function(STEP):
                    step(*batch)
    seconds: dict[Kind, float] = defaultdict(float)
    for event in profiler.events() or []:
        if event.cpu_parent is None:
            _add(event, seconds, False)
    return {kind: took / case.steps for kind, took in seconds.items()}, _work(lowered, kernels, batches[0][0])


@contextmanager
def _named_kernels() -> Iterator[None]:
    """Inside, the profiler sees every call of a native kernel by its name."""
    original = _cnnrs.Kernels

    class Named:
        def __init__(self, *arguments: Any) -> None:
            self._kernels = original(*arguments)

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._kernels, name)
            return _recorded(name, found) if callable(found) else found

    with patch.object(_cnnrs, "Kernels", Named):
        yield


def _recorded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*arguments: Any) -> Any:
        with record_function(f"{NATIVE}::{_named(name, arguments)}"):
            return run(*arguments)

    return inner


def _named(name: str, arguments: tuple[Any, ...]) -> str:
    """One kernel's convolutions are of two kinds."""
    if not name.startswith("convolution"):
        return name
    what = "conv1x1" if arguments[3].shape[2] == 1 else "depthwise"
    if name == "convolution":
        return what
    return f"{what}_weight" if arguments[-1]["input"] is None else f"{what}_both"


def _add(event: Any, seconds: dict[Kind, float], depthwise: bool) -> None:
    """The outermost events of a known kind, and by name what is around them."""
    if event.name == STEP:
        seconds[STEP, "", ""] += event.time_range.elapsed_us() / 1e6
    kind = _kind(event, depthwise)
    if kind is not None:
        seconds[kind] += event.time_range.elapsed_us() / 1e6
        return
    if event.name != STEP:
        # Without what it calls, of which there is more to say.
        own = event.time_range.elapsed_us() - sum(child.time_range.elapsed_us() for child in event.cpu_children)
        seconds[REST, event.name.split("evaluate_function: ")[-1].removeprefix("aten::"), EAGER] += own / 1e6
    for child in event.cpu_children:
        _add(child, seconds, depthwise or event.name == "DepthwiseFiltersBackward")


def _kind(event: Any, depthwise: bool) -> Kind | None:
    """None: neither it nor what is around it; ``depthwise``: within the backward pass of a native depthwise layer."""
    name = event.name
    if name.startswith(f"{NATIVE}::"):
        return _native_kind(name.removeprefix(f"{NATIVE}::"))
    if name in ("aten::conv2d", "aten::convolution"):
        return _convolution(event.input_shapes[1]), FORWARD, EAGER
    if name == "aten::convolution_backward":
        return _convolution(event.input_shapes[2]), INPUT if depthwise else BOTH, EAGER
    if name in ("aten::batch_norm", "aten::native_batch_norm"):
        return NORM, FORWARD, EAGER
    if name == "aten::native_batch_norm_backward":
        return NORM, "backward", EAGER
    if name == "aten::linear":
        return LINEAR, FORWARD, EAGER
    if name.endswith("evaluate_function: AddmmBackward0"):
        return LINEAR, BOTH, EAGER
    if name.startswith("Optimizer."):
        return UPDATE, "", EAGER
    return None


def _native_kind(name: str) -> Kind:
    what = next((what for begin, what in KERNELS.items() if name.startswith(begin)), name)
    end = re.search(r"_(input|weight|both|backward)$", name)
    parts = {"input": INPUT, "weight": WEIGHT, "both": BOTH, "backward": "backward"}
    part = "backward" if name == "finish" else parts[end[1]] if end else FORWARD
    return what, part, NATIVE


def _convolution(weight: list[int], stride: tuple[int, int] = (0, 0)) -> str:
    """By the shape of its weights; the profiler does not tell the stride."""
    if weight[1] == 1 and weight[0] > 1:
        return DEPTHWISE
    if weight[2:] == [1, 1]:
        return ONE
    return THREE if weight[2:] == [3, 3] and stride == (1, 1) else OTHER


def _work(lowered: Lowered, kernels: Kernels, images: torch.Tensor) -> dict[Kind, float]:
    """Operations on numbers of the convolutions: each gradient takes as many as forward."""
    native = {node for group in kernels.groups.values() for node in group.nodes}
    costs = lowered.graph.costs(lowered.graph.shapes(list(images.shape)))
    work: dict[Kind, float] = defaultdict(float)
    for number, (_, kind, sources, attributes) in enumerate(lowered.operations):
        if kind != "Conv2d":
            continue
        flops = float(costs[number][0])
        shape = list(lowered.tensors[attributes["weight"]].shape)
        # Only native ones have a row of their own for 3 x 3 and stride 1.
        what = _convolution(shape, attributes["stride"] if number in native else (0, 0))
        # Of the images nobody asks the gradient.
        wanted = 1.0 if sources[0] == 0 else 2.0
        if number not in native or what == DEPTHWISE:
            work[what, FORWARD, EAGER] += flops
            work[what, BOTH, EAGER] += wanted * flops
            work[what, INPUT, EAGER] += flops
        if number in native:
            for part in (FORWARD, INPUT, WEIGHT):
                work[what, part, NATIVE] += flops
            work[what, BOTH, NATIVE] += 2.0 * flops
    return work
