"""Who may import whom: the table of docs/architecture.md, read off the code."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tiltlm"

# Each room may import itself and these. The order is that of docs/architecture.md: a room imports only rooms above it.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "config": {"errors"},
    "estimation": {"errors"},
    "features": {"errors"},
    "lm": {"errors"},
    "rollouts": {"errors", "lm"},
    "targets": {"errors", "estimation", "features", "lm", "rollouts"},
    "guides": {"errors", "estimation", "features", "lm", "rollouts", "targets"},
    "objectives": {"errors", "estimation"},
    "exact": {"errors", "estimation", "features", "lm", "targets", "objectives"},
    "sampling": {"errors", "estimation", "lm", "rollouts", "targets", "guides"},
    "evaluation": {"errors", "estimation", "features", "lm", "rollouts", "targets"},
    "training": {
        "errors",
        "config",
        "estimation",
        "features",
        "lm",
        "rollouts",
        "targets",
        "guides",
        "objectives",
        "evaluation",
    },
    "runs": {"errors", "_version"},
    "reports": {"errors", "runs"},
    "app": {
        "errors",
        "config",
        "estimation",
        "features",
        "lm",
        "rollouts",
        "targets",
        "guides",
        "objectives",
        "sampling",
        "evaluation",
        "training",
        "runs",
        "reports",
    },
    "study": {
        "errors",
        "config",
        "estimation",
        "lm",
        "rollouts",
        "targets",
        "guides",
        "objectives",
        "sampling",
        "evaluation",
        "training",
        "runs",
        "reports",
        "app",
    },
    "cli": {
        "errors",
        "_version",
        "config",
        "lm",
        "rollouts",
        "sampling",
        "evaluation",
        "runs",
        "reports",
        "app",
        "study",
    },
    "__main__": {"cli"},
}
# Not dependencies of their own: this package, and the core of pydantic.
OURS = {"tiltlm", "pydantic_core"}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent != SOURCE)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of tiltlm that a file imports: at the top, inside functions, and for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name_of(module) for module in modules()}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            if node.module == "tiltlm":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("tiltlm."):
                module = node.module.removeprefix("tiltlm.")
                # ``from tiltlm.room import file`` imports the file; any other name comes from the module itself.
                whole = {f"{module}.{alias.name}" for alias in node.names}
                found |= {name if name in names else module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("tiltlm.") for alias in node.names if alias.name.startswith("tiltlm.")}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for imported in sorted(graph.get(module, ())):
            if imported not in index:
                visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], index[imported])
        if lowest[module] == index[module]:
            place = stack.index(module)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == [["a", "b", "c"]]


def test_no_two_files_import_each_other() -> None:
    graph = {name_of(path): imports(path) - {name_of(path)} for path in modules()}
    assert circles(graph) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    name = name_of(path)
    room = name.split(".")[0]
    for imported in imports(path):
        target = imported.split(".")[0]
        fine = target == room or target in ALLOWED[room]
        assert fine, f"{name} imports {imported}; {room} may import {sorted(ALLOWED[room])}"


def test_every_room_is_in_the_table_and_the_table_names_no_other() -> None:
    rooms = {name_of(path).split(".")[0] for path in modules()}
    assert rooms == set(ALLOWED)


def test_a_room_imports_only_rooms_above_it() -> None:
    order = list(ALLOWED)
    for room, allowed in ALLOWED.items():
        for target in allowed:
            assert order.index(target) < order.index(room), f"{room} may not import {target}"


def test_config_and_the_command_line_start_without_torch() -> None:
    for room in ("config", "errors", "_version"):
        for path in [*(SOURCE / room).rglob("*.py"), *SOURCE.glob(f"{room}.py")]:
            assert "import torch" not in path.read_text(encoding="utf-8"), path


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_functions_and_constructors_are_of_a_size_that_is_read_at_once(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for function in functions(ast.parse(text)):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno + 1 <= 80, function.name
        if function.name == "__init__":
            arguments = function.args
            assert len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1 <= 7


@pytest.mark.parametrize("room", ["estimation", "objectives"])
def test_rooms_of_pure_functions_never_see_a_model(room: str) -> None:
    for path in (SOURCE / room).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "transformers" not in text
        assert not {name.split(".")[0] for name in imports(path)} & {"lm", "features", "targets"}


def test_what_is_installed_for_users_is_what_the_code_imports() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["data"], *extras["schema"]]
    named = {re.split(r"[^\w-]", dependency)[0] for dependency in asked}
    imported = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.replace("pyyaml", "yaml") for name in named} == imported - set(sys.stdlib_module_names) - OURS
