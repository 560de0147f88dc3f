"""Who computes is decided in one place, from the question alone, and asking changes nothing."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnrs.engine.choice import Question, decide
from cnnrs.model.lowering import lower

MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
FIT = Question(
    "fit", "auto", lower(MODEL), inputs=torch.zeros(2, 3, 8, 8), targets=torch.zeros(2, dtype=torch.int64),
    loss_fn=F.cross_entropy, optimizer=torch.optim.Adam(MODEL.parameters()),
)  # fmt: skip
PRECONV = Question("preconv", "auto", lower(MODEL.eval(), gradients=False), inputs=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("question", [FIT, PRECONV])
def test_the_fast_engine_is_taken_where_nothing_speaks_against_it(question: Question) -> None:
    assert (decide(question).engine, decide(question).reasons) == ("cpu", ())
    assert decide(replace(question, engine="cpu")).engine == "cpu"
    # Only who asks for libtorch gets it.
    assert decide(replace(question, engine="torch")).engine == "torch"
    assert (decide(replace(question, engine="python")).engine, decide(question).reasons) == ("python", ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lowered": None, "reasons": ("it branches",)}, "it branches"),
        ({"reasons": ("a mode is on",)}, "a mode is on"),
        ({"inputs": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, "torch.float64"),
        ({"inputs": torch.zeros(0, 3, 8, 8)}, "empty"),
        ({"inputs": torch.zeros(2, 3, 8, 8, device="meta")}, "meta"),
        ({"targets": torch.zeros(2, 2)}, "targets are torch.float32"),
        ({"loss_fn": lambda outputs, targets: outputs.sum()}, "the loss is none of"),
        ({"optimizer": torch.optim.Adadelta(MODEL.parameters())}, "Adadelta"),
        ({"amp": torch.bfloat16}, "amp asks for less"),
        ({"amp": torch.bfloat16, "around": True}, "autocast asks for less"),
        ({"channels_last": True}, "memory_format"),
        ({"surroundings": ("anomaly detection is on",)}, "anomaly"),
    ],
)  # fmt: skip
def test_reasons_against_training_natively(change: dict[str, object], reason: str) -> None:
    choice = decide(replace(FIT, **change))
    assert choice.engine == "python" and reason in choice.reasons[0]
    # Whoever has asked for the engine gets the same reasons, to refuse with.
    assert decide(replace(FIT, engine="cpu", **change)).reasons == choice.reasons


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "torch.uint8"),
        ({"amp": torch.bfloat16}, "bfloat16"),
        ({"lowered": lower(copy.deepcopy(MODEL).to("meta"), gradients=False)}, "the model is on meta"),
    ],
)  # fmt: skip
def test_reasons_against_native_features(change: dict[str, object], reason: str) -> None:
    choice = decide(replace(PRECONV, **change))
    assert choice.engine == "python" and reason in choice.reasons[0]


def test_slow_convolutions_are_left_to_torch_unless_asked_for() -> None:
    slow = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 2))
    question = replace(FIT, lowered=lower(slow), optimizer=torch.optim.SGD(slow.parameters(), lr=0.1))
    assert decide(question).engine == "python" and "Conv2d" in decide(question).reasons[0]
    assert decide(replace(question, engine="cpu")).engine == "cpu"


def test_asking_changes_nothing() -> None:
    model = nn.Linear(4, 2)
    adam = torch.optim.Adam(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    question = Question(
        "fit", "auto", lower(model), inputs=torch.zeros(2, 4), targets=torch.zeros(2, dtype=torch.int64),
        loss_fn=F.cross_entropy, optimizer=adam,
    )  # fmt: skip
    for engine in ("auto", "cpu", "torch", "python"):
        decide(replace(question, engine=engine))
    assert not adam.state and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
