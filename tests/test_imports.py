"""Who may import whom: the table of docs/architecture.md, read off the code."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tiltlm"

# Each room may import itself and these. The order is the order of the house: nothing imports what stands below it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "prompts": {"errors"},
    "estimation": {"errors"},
    "features": {"errors"},
    "lm": {"errors"},
    "targets": {"errors", "estimation", "features", "lm"},
    "sampling": {"errors", "estimation", "lm", "targets"},
    "objectives": {"errors", "estimation"},
    "exact": {"errors", "estimation", "features", "lm", "targets", "objectives"},
    "training": {"errors", "estimation", "features", "lm", "targets", "objectives"},
    "runs": {"errors", "training.callbacks"},
    "config": {"errors", "training.arguments"},
    "starter": {"config", "training.arguments"},
    "build": {"errors", "prompts", "features", "lm", "objectives", "targets", "training", "runs", "config"},
    "stated": {"errors", "lm", "targets", "training", "runs", "config", "build"},
    "publish": {"errors", "lm", "targets", "training", "runs", "config"},
    "job": {"errors", "features", "lm", "targets", "training", "runs", "config", "build", "stated", "publish"},
    "target_texts": {"estimation", "lm", "targets", "sampling", "training", "runs", "config", "build", "stated"},
    "command_line": {"errors", "runs"},
    "study": {
        "errors",
        "estimation",
        "lm",
        "objectives",
        "targets",
        "sampling",
        "training",
        "runs",
        "config",
        "build",
        "stated",
        "job",
        "command_line",
    },
    "sample_command": {"errors", "lm", "sampling", "runs", "build", "target_texts", "command_line"},
    "compare_command": {"errors", "runs", "study", "command_line"},
    "cli": {
        "errors",
        "lm",
        "training",
        "runs",
        "config",
        "build",
        "stated",
        "job",
        "starter",
        "command_line",
        "sample_command",
        "compare_command",
    },
    "__main__": {"cli"},
}
# The one door that opens upward: `base.constrain(...)`, which Python users expect on the model itself.
UPWARD = {("lm.model", "targets")}
# Not dependencies of their own: this package, and the core of pydantic.
OURS = {"tiltlm", "pydantic_core"}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent != SOURCE)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of tiltlm that a file imports when it runs, deferred imports included, those for types alone not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            if node.module == "tiltlm":
                found |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif node.module and node.module.startswith("tiltlm."):
                found.add(node.module.removeprefix("tiltlm."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("tiltlm.") for alias in node.names if alias.name.startswith("tiltlm.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    name = name_of(path)
    room = name.split(".")[0]
    for imported in imports(path):
        target = imported.split(".")[0]
        fine = (
            target == room
            or (name, target) in UPWARD
            or any(imported == rule or imported.startswith(rule + ".") for rule in ALLOWED[room])
        )
        assert fine, f"{name} imports {imported}; {room} may import {sorted(ALLOWED[room])}"


def test_every_room_is_in_the_table_and_the_table_names_no_other() -> None:
    rooms = {name_of(path).split(".")[0] for path in modules()}
    assert rooms == set(ALLOWED)


def test_the_table_has_no_cycle() -> None:
    order = list(ALLOWED)
    for room, allowed in ALLOWED.items():
        for target in {rule.split(".")[0] for rule in allowed}:
            lower = order.index(target) < order.index(room)
            # Settings and callbacks of training are types without torch, which the rooms before it may name.
            assert lower or target == "training", f"{room} may not stand above {target}"


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
