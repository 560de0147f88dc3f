"""The packages point one way: a module imports only from its own package and from those below it."""

import ast
import functools
import graphlib
from collections import Counter
from pathlib import Path

import cnnrs

ROOT = Path(cnnrs.__file__).parent
#: Bottom to top; modules of one name count as packages.
ORDER = (
    "_cnnrs", "_records", "errors", "_torch", "_util", "layers", "models", "image", "data", "identity", "model",
    "engine", "training", "features", "classifier", "app",
)  # fmt: skip
#: What users type: these gather names from everywhere.
DOORS = ("cnnrs", "cnnrs.__main__", "cnnrs.pets", "cnnrs.ray")
#: Loaded when they are needed, because of what they load themselves; not to dodge a circle.
HEAVY = ("cnnrs._util.plots",)


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(["cnnrs", *parts]).removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """What a file imports of cnnrs, and whether inside a function."""
    tree, known = ast.parse(path.read_text()), modules()
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known or name == "cnnrs._cnnrs" else node.module or "" for name in whole]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, node in inner) for name in names if name.partition(".")[0] == "cnnrs"]
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else "cnnrs"


def test_nothing_is_imported_from_above() -> None:
    known = modules()
    assert {package(name) for name in known} - {package(door) for door in DOORS} <= set(ORDER)
    upward = []
    for module, path in known.items():
        if module in DOORS:
            continue
        for name, _ in imports(path):
            if name == "cnnrs":
                # The programs use cnnrs as their users do.
                allowed = package(module) == "app"
            else:
                allowed = ORDER.index(package(name)) <= ORDER.index(package(module))
            if not allowed:
                upward.append(f"{module} imports {name}")
    lines = Counter(package(module) for module, path in known.items() for _ in path.read_text().splitlines())
    print(*(f"{name}: {lines[name]} lines" for name in ORDER if lines[name]), f"{len(upward)} upward imports", sep="\n")
    assert not upward


def test_there_are_no_circles() -> None:
    known = modules()
    graph = {
        module: {name for name, _ in imports(path) if name not in (module, "cnnrs")}
        for module, path in known.items()
        if module not in DOORS
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_functions_do_not_import_to_dodge_a_circle() -> None:
    known = modules()
    hidden = [
        f"{module} imports {name}"
        for module, path in known.items()
        for name, inside in imports(path)
        if inside and name not in HEAVY
    ]
    assert not hidden


def test_public_names_are_where_the_package_says() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    told = {name: f"cnnrs.{home}" for home, names in cnnrs._HOMES.items() for name in names.split()}
    assert typed == told | dict.fromkeys(cnnrs._MODULES, "cnnrs")
    assert set(cnnrs.__all__) - {"__version__"} <= set(typed)
    assert all(hasattr(cnnrs, name) for name in cnnrs.__all__)
    assert set(dir(cnnrs)) == {*cnnrs.__all__, *cnnrs._MODULES}
    assert [name for name in dir(cnnrs) if name.startswith("_")] == ["__version__"]
