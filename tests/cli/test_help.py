"""Help is fast and complete: it loads no numerical library, and names every command and option."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest

from command_line import Command

DOCUMENTED = {
    "tune": ["CONFIG.yaml", "[KEY=VALUE]...", "--output-dir", "--resume"],
    "fit": ["CONFIG.yaml", "[KEY=VALUE]...", "--json"],
    "eval": ["RUN_DIR|MODEL", "--samples", "--json", "--top-p"],
    "sample": [
        "RUN_DIR|MODEL|CONFIG.yaml",
        "[KEY=VALUE]...",
        *("-n", "--top-p", "--prompt", "--jsonl", "--seed", "--sampler", "--proposal", "--max-draws", "--qrs-curve"),
    ],
    "compare": ["STUDY.yaml [KEY=VALUE]...|RUN_DIR...", "--output-dir", "--jobs", "--dry-run"],
    "report": ["RUN_DIR"],
    "init": ["[NAME]"],
    "env": [],
}
# The help of a command loads pydantic; the list of commands does not.
HEAVY = ("torch", "transformers", "numpy", "scipy", "peft", "accelerate", "matplotlib", "jinja2", "yaml")

ASK = """
import json, sys
from tiltlm.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["tiltlm", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in DOCUMENTED)], ids=" ".join)
@pytest.mark.serial
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", ASK, json.dumps([words])], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (ended.returncode, ended.stderr) == (0, "")
    loaded = json.loads(ended.stdout.splitlines()[-1])
    assert "typer" in loaded
    assert not {*HEAVY, *(["pydantic"] if words == ["--help"] else [])} & set(loaded)
    # CPU time, because it does not depend on the load of the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", DOCUMENTED)
def test_help_names_the_options(tiltlm: Command, command: str) -> None:
    answer = tiltlm(command, "-h")
    assert (answer.code, answer.err) == (0, "")
    for option in DOCUMENTED[command]:
        assert re.search(rf"(^|[\s,]){re.escape(option)}($|[\s,])", answer.out, re.MULTILINE), option


def test_help_lists_every_command(tiltlm: Command) -> None:
    listed = re.findall(r"^  (\w+)  ", tiltlm("--help").out.split("Commands:")[1], re.MULTILINE)
    assert listed == list(DOCUMENTED)


def test_version_is_printed_without_torch(tiltlm: Command) -> None:
    from tiltlm._version import __version__

    answer = tiltlm("--version")
    assert (answer.code, answer.out) == (0, f"tiltlm {__version__}\n")
