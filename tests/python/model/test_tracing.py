"""Looking at a model: what forward does around its calls is seen, nothing of it stays, and in doubt the module runs."""

from __future__ import annotations

import collections
import copy
import cProfile
import gc
import io
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import which_engine
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported

COUNTS: dict[str, int] = collections.Counter()
SEEN: list[str] = []
CALLS = 0


class Config:
    """An object that anyone may change."""

    steps = 0


CONFIG = Config()


class Net(nn.Module):
    """A body, a head, and a forward that is any function."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.spare = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.counters = {"calls": 0}
        self.config = Config()
        self.generator, self.numbers = random.Random(0), np.random.default_rng(0)
        self.draws = torch.Generator().manual_seed(0)
        self.times: list[float] = []
        self.cache: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def plain(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.body(x))


# -- contexts


def without_gradients(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        f = self.body(x)
    return self.head(f)


@torch.no_grad()
def undifferentiated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.body(x)


def decorated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(undifferentiated(self, x))


def set_by_hand(self: Any, x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    f = self.body(x)
    torch.set_grad_enabled(True)
    return self.head(f)


def with_hooks(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return self.head(self.body(x))


def autocast(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        f = self.body(x)
    return self.head(f.float()) if f.dtype is torch.bfloat16 else self.head(f)


@torch.autocast("cpu", torch.bfloat16)
def all_autocast(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.body(x))


# -- randomness, and the world outside


def coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if random.random() < 0.5 else self.head(self.spare(f))


def own_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if self.generator.random() < 0.5 else self.head(self.spare(f))


def numpy_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if np.random.rand() < 0.5 else self.head(self.spare(f))


def own_numpy_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if self.numbers.random() < 0.5 else self.head(self.spare(f))


def puts_back(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        f = F.dropout(self.body(x), 0.5, self.training)
    return self.head(f)


class Timed(list[int]):
    """Looks at the clock whenever it is gone through."""

    def __iter__(self) -> Any:
        time.perf_counter()
        return super().__iter__()


def clock_in_an_argument(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.body(F.adaptive_avg_pool2d(x, Timed([3, 3]))))


def torch_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if torch.rand(1).item() < 0.5 else self.head(self.spare(f))


def torch_draw(self: Any, x: torch.Tensor) -> torch.Tensor:
    torch.rand(1)
    return plain(self, x)


def own_torch_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if torch.rand(1, generator=self.draws) < 0.5 else self.head(self.spare(f))


def system_coin(self: Any, x: torch.Tensor) -> torch.Tensor:
    random.SystemRandom().random()
    return plain(self, x)


def urandom(self: Any, x: torch.Tensor) -> torch.Tensor:
    os.urandom(1)
    return plain(self, x)


def clock(self: Any, x: torch.Tensor) -> torch.Tensor:
    begin = time.perf_counter()
    result = plain(self, x)
    self.times.append(time.perf_counter() - begin)
    return result


def printing(self: Any, x: torch.Tensor) -> torch.Tensor:
    print("forward")
    return plain(self, x)


# -- state


def counts_in_a_buffer(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.steps += 1
    return plain(self, x)


def counts_by_an_operator(self: Any, x: torch.Tensor) -> torch.Tensor:
    torch.ops.aten.add_.Tensor(self.steps.data, 1)
    return plain(self, x)


def counts_in_data(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.steps.data[0] = self.steps.data[0] + 1
    return plain(self, x)


def running_mean(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    self.mean = 0.9 * self.mean + 0.1 * f.detach().mean(0)
    return self.head(f)


def counts_in_a_dict(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.counters["calls"] += 1
    return plain(self, x)


def counts_in_an_object(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.config.steps += 1
    return plain(self, x)


def counts_in_a_global(self: Any, x: torch.Tensor) -> torch.Tensor:
    global CALLS
    CALLS += 1
    return plain(self, x)


def counts_in_a_global_dict(self: Any, x: torch.Tensor) -> torch.Tensor:
    COUNTS["calls"] += 1
    CONFIG.steps += 1
    SEEN.append("x")
    return plain(self, x)


def counts_in_the_class(self: Any, x: torch.Tensor) -> torch.Tensor:
    type(self).calls = getattr(type(self), "calls", 0) + 1
    return plain(self, x)


def counts_in_a_closure() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    calls, seen = 0, []

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        seen.append(calls)
        return self.head(self.body(x)) if calls % 2 else self.head(self.spare(self.body(x)))

    return counting


def remembers(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.cache["features"] = f = self.body(x)
    return self.head(f)


def freezes(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.body.requires_grad_(False)
    return plain(self, x)


def switches_mode(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.spare.eval()
    return plain(self, x)


def reads_a_weight(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(F.leaky_relu(self.body[1](x.flatten(1)), float(self.spare.bias[0])))


# -- questions


def is_a_tensor(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if isinstance(x, torch.Tensor) and torch.is_tensor(x) else self.head(self.spare(f))


def has_methods(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(self.spare(f)) if hasattr(x, "tensors") or not hasattr(x, "cumsum") else self.head(f)


def asks_for_the_type(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if x.dtype is torch.float32 else self.head(self.spare(f))


def asks_for_gradients(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(self.spare(f)) if f.grad_fn is not None and f.requires_grad else self.head(f)


def asks_for_the_device(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if x.device == torch.device("cpu") and not x.is_cuda else self.head(self.spare(f))


def asks_for_the_shape(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(f) if isinstance(x.shape, torch.Size) and x.shape[2] == 3 else self.head(self.spare(f))


def is_in_a_list(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    return self.head(self.spare(f)) if any(x is y for y in [f]) or x in [x] else self.head(f)


def swallows(self: Any, x: torch.Tensor) -> torch.Tensor:
    f = self.body(x)
    try:
        return self.head(f) if float(f.sum()) > -1e9 else self.head(self.spare(f))
    except Exception:
        return self.head(self.spare(f))


CONTEXTS = [without_gradients, decorated, set_by_hand, with_hooks]
PRECISION = [autocast, all_autocast]
OUTSIDE = [coin, own_coin, numpy_coin, own_numpy_coin, torch_coin, torch_draw, own_torch_coin, system_coin, urandom,
           puts_back, clock, clock_in_an_argument, printing]  # fmt: skip
STATE = [counts_in_a_buffer, counts_by_an_operator, counts_in_data, running_mean, counts_in_a_dict,
         counts_in_an_object, counts_in_a_global, counts_in_a_global_dict, counts_in_the_class,
         counts_in_a_closure, remembers, freezes, switches_mode, reads_a_weight]  # fmt: skip
QUESTIONS = [is_a_tensor, has_methods, asks_for_the_type, asks_for_gradients, asks_for_the_device, asks_for_the_shape,
             is_in_a_list, swallows]  # fmt: skip


def net(function: Any) -> Net:
    torch.manual_seed(0)
    return Net(function() if function is counts_in_a_closure else function)


def random_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def seed() -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 2, 3, 3), torch.randint(3, (4,))) for _ in range(6)]


@pytest.mark.parametrize("engine", ["played", "torch"])
@pytest.mark.parametrize("function", [*CONTEXTS, *PRECISION, *OUTSIDE, *STATE, *QUESTIONS], ids=lambda f: f.__name__)
def test_the_model_trains_as_in_the_plain_loop(function: Any, engine: str) -> None:
    ours, loop = net(function), net(function)
    # What is played steps as PyTorch's fused optimizers do.
    fused = None if engine == "torch" else True
    # Which read learning rates as float32.
    sgds = [torch.optim.Adam(model.parameters(), lr=2**-7, fused=fused) for model in (ours, loop)]
    taken: Any = "torch" if engine == "torch" and cnnrs.explain(ours).operations else "auto"
    seed()
    with nullcontext() if engine == "torch" else which_engine.played():
        for epoch in range(2):
            cnnrs.fit(epoch, ours, batches(), optimizer=sgds[0], loss_fn=F.cross_entropy, engine=taken, verbose=False)
    drawn = random_states()
    seed()
    for _ in range(2):
        for inputs, targets in batches():
            sgds[1].zero_grad()
            F.cross_entropy(loop(inputs), targets).backward()
            sgds[1].step()
    assert drawn == random_states()
    expected = loop.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert ours.counters == loop.counters and ours.config.steps == loop.config.steps
    assert ours.generator.getstate() == loop.generator.getstate()


@pytest.mark.parametrize("function", [*CONTEXTS, *PRECISION, *OUTSIDE, *STATE, *QUESTIONS], ids=lambda f: f.__name__)
def test_features_are_the_modules(function: Any) -> None:
    ours, module = net(function), net(function).eval()
    seed()
    features, _ = cnnrs.preconv(batches(), ours)
    seed()
    with torch.no_grad():
        expected = torch.cat([module(inputs) for inputs, _ in batches()])
    # Engine cpu adds eighteen products of size one in another order.
    torch.testing.assert_close(features, expected.to(features.dtype), rtol=0.0, atol=1e-5)


def everything(model: Net) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return (
        [(name, repr(value)) for name, value in vars(model).items() if not name.startswith("_")],
        {name: tensor.tolist() for name, tensor in state.items()},
        [list(vars(module)) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        model.generator.getstate(), repr(model.numbers.bit_generator.state), model.draws.get_state().tolist(),
        model.config.steps, dict(COUNTS), list(SEEN), CALLS, CONFIG.steps, getattr(Net, "calls", None),
        random_states(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("function", [*CONTEXTS, *PRECISION, *OUTSIDE, *STATE, *QUESTIONS], ids=lambda f: f.__name__)
def test_looking_leaves_no_trace(function: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = net(function)
    before = everything(model)
    cnnrs.explain(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        cnnrs.explain(model, (1, 2, 3, 4))
        raise RuntimeError
    assert everything(model) == before and not capsys.readouterr().out
    torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(model.state_dict())
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (without_gradients, "forward runs a part with another grad mode than the rest"),
        (decorated, "another grad mode"),
        (set_by_hand, "another grad mode"),
        (with_hooks, "another hooks of saved tensors"),
        (autocast, "another autocast"),
        (all_autocast, "another autocast"),
        (coin, r"forward calls Random.random\(\), whose result or effect is not the graph's"),
        (numpy_coin, "forward draws NumPy's random numbers itself"),
        (torch_draw, "forward draws PyTorch's random numbers itself"),
        (own_numpy_coin, "forward changes attributes of Net"),
        (puts_back, r"forward calls fork_rng\(\), on which random numbers depend"),
        (clock, r"perf_counter\(\)"),
        (clock_in_an_argument, r"perf_counter\(\)"),
        (printing, r"print\(\)"),
        (counts_in_a_buffer, r"forward changes a tensor in place \(add_\), once per call"),
        (counts_by_an_operator, r"forward changes a tensor in place \(add_.Tensor\), once per call"),
        (counts_in_a_dict, "forward changes attributes of Net"),
        (counts_in_a_global, "counts_in_a_global.., which sets global variables"),
        (counts_in_a_global_dict, "forward changes global CONFIG, global COUNTS, global SEEN"),
        (counts_in_the_class, "forward changes class Net"),
        (counts_in_a_closure, "which sets calls of an enclosing function"),
        (reads_a_weight, "forward reads the value of a tensor"),
        (asks_for_gradients, "forward asks for the grad_fn of a tensor"),
        (asks_for_the_shape, "forward computes with the size of a tensor"),
        (swallows, "forward reads the value of a tensor"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_explain_gives_the_reason(function: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        lower(net(function))
    assert cnnrs.explain(net(function)).engine == "python"


def test_what_is_harmless_is_lowered() -> None:
    for function in (plain, is_a_tensor, has_methods):
        assert cnnrs.explain(net(function), (4, 2, 3, 3)).engine == "cpu", function
    # Features have no gradients anyway.
    for function in CONTEXTS[:3]:
        assert cnnrs.explain(net(function), (4, 2, 3, 3)).preconv == "cpu", function
    assert cnnrs.explain(net(autocast)).preconv == "python"
    same = net(lambda self, x: [torch.enable_grad().__enter__(), plain(self, x)][1])
    assert cnnrs.explain(same).engine == "cpu"


def test_a_model_that_asks_for_autocast_is_traced_inside_it() -> None:
    def asks(self: Any, x: torch.Tensor) -> torch.Tensor:
        f = self.body(x)
        return self.head(self.spare(f)) if torch.is_autocast_enabled("cpu") else self.head(f)

    ours, loop = net(asks), net(asks)
    sgds = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, loop)]
    cnnrs.fit(0, ours, batches(), optimizer=sgds[0], loss_fn=F.cross_entropy, amp="bf16", verbose=False)
    for inputs, targets in batches():
        sgds[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(loop(inputs), targets)
        loss.backward()
        sgds[1].step()
    assert torch.equal(ours.spare.weight, loop.spare.weight)


def test_what_wraps_a_model_is_not_taken_apart() -> None:
    from torch.overrides import TorchFunctionMode

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = net(plain)
    with Doubled():
        assert "a mode that intercepts" in cnnrs.explain(model).reasons[0]
    assert cnnrs.explain(model).engine == "cpu"
    with torch.device("cpu"):
        assert cnnrs.explain(model).engine == "cpu"
    model.body.compile(backend="eager")
    assert cnnrs.explain(model).reasons == ("body (Sequential) has been compiled",)

    class Called(Net):
        def __call__(self, x: torch.Tensor) -> Any:
            return super().__call__(x).relu()

    assert lower(Called(plain)).kinds[-1] == "ReLU"


def test_tracing_is_one_at_a_time_and_leaves_other_threads_alone() -> None:
    import threading

    models, failed = [net(plain) for _ in range(4)], []

    def look(model: Net) -> None:
        for _ in range(5):
            if not torch.equal(model(torch.ones(1, 2, 3, 3)), model(torch.ones(1, 2, 3, 3))):
                failed.append("forward")
            if len(lower(model).operations) != 5:
                failed.append("lower")

    threads = [threading.Thread(target=look, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and nn.Module.__call__.__name__ == "_wrapped_call_impl"


# -- cut at a layer


def doubled_names(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.body[1](x.flatten(1))
    out = h
    out += self.spare(h.sigmoid())
    return self.head(h)


def unread(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.body[1](x.flatten(1))
    F.relu(h, inplace=True)
    h.mul_(2.0)
    return self.head(h)


@pytest.mark.parametrize(
    "function", [plain, doubled_names, unread, *PRECISION, *OUTSIDE, *STATE, *QUESTIONS], ids=lambda f: f.__name__
)
def test_a_layer_gets_what_it_gets_in_the_model(function: Any) -> None:
    ours, module = net(function), net(function).eval()
    seed()
    before = everything(ours)
    body = cnnrs.backbone(ours, "head")
    assert everything(ours) == before
    features, _ = cnnrs.preconv(batches(), body)
    found: list[torch.Tensor] = []
    module.head.register_forward_hook(lambda _, __, output: found.append(output))
    seed()
    with torch.no_grad():
        for inputs, _ in batches():
            module(inputs)
    torch.testing.assert_close(features, torch.cat(found).to(features.dtype), rtol=0.0, atol=1e-5)


def test_what_the_garbage_collector_calls_is_not_forwards() -> None:
    def collected(phase: str, info: Any) -> None:
        global CALLS
        CALLS += 0

    gc.callbacks.append(collected)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        assert cnnrs.explain(net(plain), (4, 2, 3, 3)).engine == "cpu" and gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(collected)


def test_a_profiler_of_the_users_own_stays_on() -> None:
    model, profiler = net(plain), cProfile.Profile()
    profiler.enable()
    try:
        lowered = lower(model)
        assert sys.getprofile() is profiler
    finally:
        profiler.disable()
    assert lowered.kinds == lower(model).kinds and sys.getprofile() is None
