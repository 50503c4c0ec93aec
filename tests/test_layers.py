"""Imports go one way only: every file belongs to a layer and imports from its own or from those below; no two files import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top. Parts that stand side by side must not import each other.
LAYERS = [
    ["errors"],
    ["seeds", "files", "native", "machine", "home", "stopping"],
    ["config"],
    ["kernels"],
    ["model"],
    ["compaction", "data"],
    ["training"],
    ["deployment", "report"],
    ["runs"],
    ["api"],
    ["cli"],
]
# The files and folders of der_fast/data/, in the same manner.
DATA_LAYERS = [
    ["io", "sizes", "shards"],
    ["catalogue", "augment", "selection"],
    ["decode"],
    ["read"],
    ["source"],
    ["photos", "memory_source"],
    ["duplicates", "identity", "joined", "resident", "storage"],
    ["sets"],
    ["load"],
    ["whole"],
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
DATA_HEIGHT = {part: height for height, parts in enumerate(DATA_LAYERS) for part in parts}
# The face of the package: it may name everything, and nothing inside may import it.
FACE = "der_fast"


def read_tree(root: Path) -> dict[str, str]:
    """Return module name → source of the package below `root`; the folder kernels/ is installed as der_fast.kernels."""
    modules: dict[str, str] = {}
    for folder, package in ((root / "der_fast", "der_fast"), (root / "kernels", "der_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])
            modules[name] = path.read_text(encoding="utf-8")
    return modules


def imports_of(name: str, source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Yield the modules of the package that `name` imports anywhere, lazily or for type checking included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node, modules)
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target == FACE or target.startswith(f"{FACE}."))


def _absolute(name: str, node: ast.ImportFrom, modules: Mapping[str, str]) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = any(other.startswith(f"{name}.") for other in modules)
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def part_of(name: str) -> str:
    """Return the part that a module belongs to: 'training' for der_fast.training.step."""
    return name.split(".")[1] if "." in name else FACE


def room_of(name: str) -> str:
    """Return the file or folder of its part that a module belongs to: 'read' for der_fast.data.read.walk."""
    return name.split(".")[2] if name.count(".") > 1 else ""


def faults_in(modules: Mapping[str, str]) -> list[str]:
    """Return what breaks the rules: unknown parts, imports upwards or sideways, imports of what does not exist, circles."""
    faults = [f"{name} belongs to no layer" for name in modules if part_of(name) not in {*HEIGHT, FACE}]
    graph = {name: set(imports_of(name, source, modules)) for name, source in modules.items() if name != FACE}
    for name, targets in graph.items():
        for target in sorted(targets):
            faults += [f"{name} imports {target}: {reason}" for reason in _complaints(name, target, modules)]
    return faults + [f"circle: {' → '.join(circle)}" for circle in circles_in(graph)]


def _complaints(name: str, target: str, modules: Mapping[str, str]) -> Iterator[str]:
    if target == FACE:
        # The command line shows where the package lies.
        if part_of(name) != "cli":
            yield "the package's face is for users"
    elif target not in modules:
        yield "there is no such module"
    elif part_of(name) != part_of(target) and HEIGHT.get(part_of(target), 99) >= HEIGHT.get(part_of(name), -1):
        yield "imports go downwards only"
    elif part_of(name) == part_of(target) == "data":
        here, there = room_of(name), room_of(target)
        if here and here != there and DATA_HEIGHT.get(there, 99) >= DATA_HEIGHT.get(here, -1):
            yield "within data/, imports go downwards only"


def circles_in(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the circles that a depth-first walk meets; none if and only if the graph has none."""
    circles: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            circles.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                if target != name:
                    walk(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return circles


def test_tree_keeps_the_order() -> None:
    modules = read_tree(ROOT)
    assert len(modules) > 20
    assert faults_in(modules) == []


def first_imports(name: str, source: str, modules: Mapping[str, str]) -> set[str]:
    """Return what importing `name` imports at once: the modules that it names outside of functions, and the packages that they lie in."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [ast.Pass()]
    own = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
    found: set[str] = set()
    for target in imports_of(name, ast.unparse(tree), modules):
        parents = {target.rsplit(".", depth)[0] for depth in range(1, target.count(".") + 1)}
        found |= {target, *parents} - own - {name, FACE}
    return found & set(modules)


def test_every_module_can_be_imported_first() -> None:
    """A package's __init__ is imported with each of its modules, so it must not lead back to a module that needs one of them."""
    modules = read_tree(ROOT)
    assert circles_in({name: first_imports(name, source, modules) for name, source in modules.items() if name != FACE}) == []
    # What this is about: a package that imports what imports a part of the package.
    tree = {"der_fast.a": "from der_fast.bank.part import X", "der_fast.bank": "from der_fast.a import Y", "der_fast.bank.part": ""}
    assert circles_in({name: first_imports(name, source, tree) for name, source in tree.items()}) != []


def test_every_part_of_the_tree_was_seen() -> None:
    parts = {part_of(name) for name in read_tree(ROOT)}
    assert parts >= {"errors", "config", "kernels", "model", "data", "training", "report", "api", "cli"}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"der_fast.config.a": "from der_fast.model.b import X", "der_fast.model.b": ""}, "downwards only"),
        ({"der_fast.data.a": "import der_fast.compaction.b", "der_fast.compaction.b": ""}, "downwards only"),
        (
            {"der_fast.config.a": "def f():\n    from der_fast.cli import b", "der_fast.cli": "", "der_fast.cli.b": ""},
            "downwards only",
        ),
        ({"der_fast.model.a": "from ..training import b", "der_fast.training": "", "der_fast.training.b": ""}, "downwards only"),
        ({"der_fast.data.io.a": "from der_fast.data.read import b", "der_fast.data.read": "", "der_fast.data.read.b": ""}, "within data/"),
        ({"der_fast.data.read": "", "der_fast.data.odds": "from der_fast.data import read"}, "within data/"),
        ({"der_fast.odds.a": ""}, "belongs to no layer"),
        ({"der_fast.model.a": "import der_fast", "der_fast": ""}, "face"),
        ({"der_fast.model.a": "from der_fast.model.gone import X"}, "no such module"),
        ({"der_fast.model.a": "from der_fast.model.b import X", "der_fast.model.b": "from der_fast.model.a import Y"}, "circle"),
        ({"der_fast.model": "from .a import X", "der_fast.model.a": "from . import Y"}, "circle"),
    ],
)
def test_faults_are_found(modules: dict[str, str], words: str) -> None:
    faults = faults_in(modules)
    assert any(words in fault for fault in faults), faults


def test_imports_downwards_are_fine() -> None:
    modules = {
        "der_fast": "from der_fast.cli import main",
        "der_fast.cli": "",
        "der_fast.cli.main": "import torch\nfrom der_fast.training import run\nfrom .extra import Z",
        "der_fast.cli.extra": "from der_fast.errors import UserError",
        "der_fast.training": "",
        "der_fast.training.run": "from der_fast import kernels",
        "der_fast.kernels": "",
        "der_fast.errors": "",
    }
    assert faults_in(modules) == []
