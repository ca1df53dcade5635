"""The package is laid out as docs/DESIGN.md says, and imports go one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coadvise"
DESIGN = (ROOT / "docs" / "DESIGN.md").read_text()
TABLE = DESIGN.partition("## Rooms")[2].partition("\n## ")[0]
ROOMS = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", TABLE, re.M)  # each may import from those before it
FACADES = {"__init__", "__main__"}  # the names of all rooms, loaded on first use; the command line
GUARDED = ("timm", "torchvision")


def modules() -> dict[str, ast.Module]:
    """Each module's syntax tree by its dotted name below the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


MODULES = modules()


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(module: str) -> set[str]:
    """The modules of the package that one imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "coadvise":
            base = node.module.split(".")[1:]
            for alias in node.names:
                named = ".".join([*base, alias.name])
                found.add(named if {named, f"{named}.__init__"} & MODULES.keys() else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("coadvise.")}
    return {f"{name}.__init__" if f"{name}.__init__" in MODULES else name for name in found if name} & MODULES.keys()


def test_the_rooms_are_those_of_the_design() -> None:
    there = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    there |= {path.stem for path in PACKAGE.glob("*.py")} - FACADES
    assert set(ROOMS) == there
    assert len(ROOMS) == len(set(ROOMS))
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    assert len(DESIGN.splitlines()) <= 250


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_before_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for module in MODULES:
        if room_of(module) == room:
            strays = {name for name in imported(module) if room_of(name) not in allowed}
            assert not strays, f"{module} imports {sorted(strays)}"


def test_the_report_imports_nothing_of_the_package_but_itself() -> None:
    assert {room_of(name) for module in MODULES if room_of(module) == "report" for name in imported(module)} == {
        "report"
    }


def test_there_is_no_circle_of_files() -> None:
    graph = {module: imported(module) for module in MODULES if module not in FACADES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                if not (name.endswith("__init__") and module.startswith(name.removesuffix("__init__"))):
                    visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_torchvision_is_guarded_wherever_it_may_be_imported_first() -> None:
    for module, tree in MODULES.items():
        lines = [(node.lineno, name) for node in ast.walk(tree) for name in _names(node)]
        first = min((line for line, name in lines if name.split(".")[0] in GUARDED), default=None)
        if first is not None:
            room = MODULES.get(f"{room_of(module)}.__init__", ast.Module([], []))
            guarded = "coadvise.torchvision_guard" in {name for node in ast.walk(room) for name in _names(node)}
            before = any(name == "coadvise.torchvision_guard" and line < first for line, name in lines)
            assert guarded or before, (
                f"{module} imports timm or torchvision without coadvise.torchvision_guard before it"
            )


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def test_what_the_design_names_is_there() -> None:
    named = {name for name in re.findall(r"`((?:\w+/)+\w+\.py)`", DESIGN) if "NAME" not in name}
    assert len(named) >= 15
    roots = (PACKAGE, ROOT)
    assert not [name for name in named if not any((root / name).exists() for root in roots)]
