"""Every Python block and every `cnnrs` command in docs/ runs, in order, one namespace and one folder per page."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

import cnnrs
from cnnrs.app.cli import main

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
# Its blocks need a cluster; they have a test of their own.
ELSEWHERE = {"preconv.md"}
# Blocks that show a step inside a script of the reader's; these are the names such a script has.
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, num_processes=1, prepare=lambda *given: given
)
GIVEN = {
    "loader.md": lambda: {
        "model": torch.nn.Linear(2, 2),
        "optimizer": None,
        "cnnrs": cnnrs,
        "train": torch.utils.data.TensorDataset(torch.rand(8, 2), torch.arange(8)),
        "epochs": 1,
        # accelerate is not installed for the tests.
        "accelerate": SimpleNamespace(Accelerator=lambda: ACCELERATOR),
        "loader": cnnrs.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 2), torch.arange(8)), batch_size=4),
    }
}


def check_fine_tuned(page: dict[str, object]) -> None:
    """The recipe has changed the block and the head, and neither what is before them nor any running statistics."""
    network: torch.nn.Module = page["network"]  # type: ignore[assignment]
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {".".join(name.split(".")[:-2]) for name in learns} == {"0.body.layer4.1", ""}
    pretrained = cnnrs.backbone("resnet18").state_dict()
    best = torch.load("fine-tuned.pt", weights_only=True)
    changed = {name for name in pretrained if not torch.equal(pretrained[name], best["model"][f"0.{name}"])}
    assert changed <= {name.removeprefix("0.") for name in learns} and bool(changed) == (best["epoch"] >= 0)
    assert set(best["model"]) == set(network.state_dict())


#: What is looked at when a page has run.
AFTER = {"training.md": check_fine_tuned}


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block that can be run."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / name).read_text(), flags=re.M | re.S)
    return [(language, text) for language, text in found if language in ("python", "sh")]


@pytest.fixture
def cats_and_dogs(cat_and_dog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `cat_and_dog` of noise, and random numbers where weights would be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(cat_and_dog / "cache"))

    def random_weights(self: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        name = type(self).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name, weights=None).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    return cat_and_dog


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")
@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name) and name not in ELSEWHERE])
def test_blocks_run(name: str, cats_and_dogs: Path) -> None:
    namespace: dict[str, object] = GIVEN.get(name, dict)()
    for language, text in blocks(name):
        if language == "python":
            exec(compile(text, name, "exec"), namespace)
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "cnnrs":
                assert main(words[1:]) == 0, line
    AFTER.get(name, lambda page: None)(namespace)


def test_every_page_is_linked_and_links_lead_somewhere() -> None:
    for name in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "docs" / name).read_text()):
            assert (ROOT / "docs" / target).exists(), f"docs/{name} links to {target}"
    readme = (ROOT / "README.md").read_text()
    assert [name for name in PAGES if f"(docs/{name})" not in readme] == []


def test_options_in_help_are_in_the_docs_only_if_they_exist() -> None:
    from cnnrs.app.cli import parser

    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/cli.md"))
    commands = next(action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    known = {option for command in commands.choices.values() for option in command._option_string_actions}  # type: ignore[union-attr]
    named = set(re.findall(r"cnnrs [^`\n]*?(--[a-z-]+)", text))
    assert named and named <= known | {"--version"}, named - known


def test_pydoc_of_fit() -> None:
    import pydoc

    text = pydoc.plain(pydoc.render_doc(cnnrs.fit))
    for words in ("Train or validate", "Args:", "Returns:", "Raises:", "loss, accuracy"):
        assert words in text
