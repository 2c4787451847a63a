"""Code that compiles, and code that passes tests in its own process within limits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.errors import UsageError
from tiltlm.features import Feature, build_feature, code_feature, run_file_form
from tiltlm.features.code import RUNNER, compiles, program_of

DOUBLE = "def double(x):\n    return 2 * x\n"
ASSERTS = "assert double(2) == 4\nassert double(-3) == -6"
CHECKS = code_feature(passes=ASSERTS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1", 1.0),
        ("", 1.0),
        (DOUBLE, 1.0),
        ("print('unclosed", 0.0),
        ("def f(:\n  pass", 0.0),
        ("return 3", 0.0),
        ("  x = 1", 0.0),
        ("He was born in London.", 0.0),
        ("x = '\\d'\nif x is 3: pass", 1.0),
        ("x = 1\0", 0.0),
        ("(" * 500 + ")" * 500, 0.0),
        ("-" * 100_000 + "1", 0.0),
        ("x = '\ud800'", 0.0),
        ("1 / 0", 1.0),
    ],
)
def test_compiles_is_what_python_says_of_it(text: str, value: float) -> None:
    assert code_feature()([text]).tolist() == [value]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_compiles_or_does_not(text: str) -> None:
    assert compiles(text) in (True, False)


def test_fenced_blocks_of_python_are_the_program_where_there_are_any() -> None:
    prose = f"Here it is:\n```python\n{DOUBLE}```\nand a test:\n``` py\ndouble(3)\n```\nDone."
    assert program_of(prose) == DOUBLE + "\ndouble(3)\n"
    assert program_of("Cut off:\n```python\nx = [1,\n2]") == "x = [1,\n2]"
    assert program_of("```bash\nls\n```") == "```bash\nls\n```"
    assert program_of("x = '```python'") == "x = '```python'"
    assert code_feature()([prose, "```bash\nls\n```", "```python\nx = \n```"]).tolist() == [1.0, 0.0, 0.0]
    assert CHECKS([prose]).tolist() == [1.0]


def test_passing_is_compiling_and_holding_every_assertion() -> None:
    programs = {
        DOUBLE: 1.0,
        "double = lambda x: x + x": 1.0,
        "def double(x):\n    return x ** 2": 0.0,
        "def double(x):\n    return 2 * y": 0.0,
        "def double(x) return 2 * x": 0.0,
        "": 0.0,
        DOUBLE + "print('x' * 10**7)": 1.0,
        DOUBLE + "import sys; sys.stderr.write('x' * 10**7)": 1.0,
        DOUBLE + "assert input() == 'nothing to read'": 0.0,
        DOUBLE + "raise SystemExit(0)": 0.0,
    }
    assert CHECKS([*programs, *programs]).tolist() == [*programs.values(), *programs.values()]


@pytest.mark.parametrize("end", ["raise SystemExit", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_ending_before_the_tests_is_not_passing_them(end: str) -> None:
    assert CHECKS([DOUBLE + end, f"def double(x):\n    {end}"]).tolist() == [0.0, 0.0]


def test_tests_from_a_file_are_statements_and_functions(tmp_path: Path) -> None:
    file = tmp_path / "double_tests.py"
    file.write_text(
        "import unittest\nfrom solution import double as theirs\n\n"
        "def test_numbers():\n    assert double(2) == 4\n\n"
        "def test_text():\n    assert theirs('a') == 'aa'\n"
    )
    feature = code_feature(passes=file)
    wrong = "def double(x):\n    return x + 2"
    text_only_wrong = "def double(x):\n    return float(2 * x)"
    own = DOUBLE + "def test_of_its_own(x):\n    raise ValueError"
    assert feature([DOUBLE, wrong, text_only_wrong, own]).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert run_file_form(feature) == {"code": {"passes": str(file)}}


def test_the_prompt_may_be_the_beginning_of_the_program() -> None:
    prompts, completions = ["def double(x):\n", "def double(x):\n"], ["    return 2 * x", "    return 3 * x"]
    assert code_feature(reads="text")(completions, prompts=prompts).tolist() == [1.0, 1.0]
    assert code_feature()(completions, prompts=prompts).tolist() == [0.0, 0.0]
    assert code_feature(passes=ASSERTS, reads="text")(completions, prompts=prompts).tolist() == [1.0, 0.0]


@pytest.mark.serial
def test_programs_run_beside_each_other_and_each_within_its_time() -> None:
    sleepy = [f"import time\n{i}\ntime.sleep(60)" for i in range(4)]
    began = time.monotonic()
    values = code_feature(passes=ASSERTS, timeout=0.8)([*sleepy, DOUBLE, "while True: pass"])
    # Five of 0.8 s each on two cores or more; one after the other would take 4 s, their sleep a minute.
    assert time.monotonic() - began < (3.8 if (os.cpu_count() or 1) > 1 else 8)
    assert values.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.serial
def test_the_same_program_is_run_once() -> None:
    began = time.monotonic()
    for _ in range(20):
        assert code_feature(passes=ASSERTS, timeout=0.3)(["while True: pass"] * 50).tolist() == [0.0] * 50
    assert time.monotonic() - began < 3


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")


@LINUX
@pytest.mark.parametrize(
    ("program", "memory"),
    [
        ("held = bytearray(200 * 2**20)", 128),
        ("held = 'a'\nwhile True: held += held", 64),
        ("open('big', 'wb').write(bytes(2 * 2**20))", 256),
        ("files = [open('f%d' % i, 'w') for i in range(100)]", 256),
    ],
)
@pytest.mark.serial
def test_memory_and_files_are_limited(program: str, memory: int) -> None:
    began = time.monotonic()
    assert code_feature(passes=ASSERTS, memory=memory, timeout=20)([DOUBLE + program]).tolist() == [0.0]
    assert time.monotonic() - began < 10
    assert code_feature(passes=ASSERTS, memory=memory)([DOUBLE]).tolist() == [1.0]


def test_it_works_in_an_empty_folder_that_is_gone_afterwards(tmp_path: Path) -> None:
    told = tmp_path / "where"
    program = DOUBLE + (
        "import os\nassert os.listdir() == [] and 'SECRET' not in os.environ\n"
        f"open('mine', 'w').write('x'); open({str(told)!r}, 'w').write(os.getcwd())"
    )
    os.environ["SECRET"] = "1"
    try:
        assert CHECKS([program]).tolist() == [1.0]
    finally:
        del os.environ["SECRET"]
    assert not Path(told.read_text()).exists()


def test_site_packages_and_the_current_folder_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module in ("torch", "tiltlm", "beside"):
        assert CHECKS([f"{DOUBLE}import {module}"]).tolist() == [0.0]
    assert CHECKS([DOUBLE + "import math, json, collections"]).tolist() == [1.0]


@LINUX
@pytest.mark.serial
def test_its_children_are_ended_with_it(tmp_path: Path) -> None:
    note = tmp_path / "child"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "time.sleep(60)"
    )
    assert code_feature(passes=ASSERTS, timeout=0.7)([program]).tolist() == [0.0]
    # A plain user may start none, and root's is gone.
    if note.exists():
        child = Path(f"/proc/{note.read_text()}/stat")
        ends = time.monotonic() + 5
        while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < ends, "the child outlived its program"
            time.sleep(0.02)


def as_a_plain_user(program: str, tests: str = "") -> bool:
    """Whether it passes as a user who is not root; skips where that cannot be tried."""
    # root's own Python may lie where no other user looks.
    system = shutil.which("python3", path="/usr/local/bin:/usr/bin") if os.getuid() == 0 else None
    python = system or sys.executable
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    job = json.dumps({"program": program, "tests": tests, "word": "word"})
    answer, pipe = os.pipe()
    options: dict[str, Any] = {"pass_fds": [pipe], "cwd": "/", "capture_output": True, "timeout": 20, **user}
    # Not in pytest's folder: any run of pytest that starts meanwhile closes it to other users.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        runner = shutil.copy(RUNNER, folder)
        try:
            ended = subprocess.run([python, "-I", "-S", runner, "5", "256", str(pipe)], input=job.encode(), **options)
        except PermissionError:
            pytest.skip("another user cannot run this Python")
    os.close(pipe)
    with os.fdopen(answer, "rb") as read:
        passed = read.read() == b"word"
    assert passed or b"Error" in ended.stderr, ended.stderr
    return passed


@LINUX
@pytest.mark.parametrize(
    "start",
    [
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
    ],
)
def test_a_plain_users_program_starts_no_others(start: str) -> None:
    if not as_a_plain_user("x = 1"):
        pytest.skip("another user cannot run this Python")
    assert not as_a_plain_user(start)


@LINUX
def test_it_reaches_no_network_where_the_system_lets_it_have_one_of_its_own() -> None:
    if subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this system gives no network namespaces to plain users")
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1).close()"
        exec(connect)
        assert CHECKS([f"{DOUBLE}\n{connect}", DOUBLE]).tolist() == [0.0, 1.0]


def test_it_is_measured_from_several_threads_without_leaving_files_open() -> None:
    found: list[list[float]] = []
    texts = [DOUBLE + "# not run before", "x = 1  # nor this"]
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    threads = [threading.Thread(target=lambda: found.append(CHECKS(texts).tolist())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1.0, 0.0]] * 3
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


FEATURES = [code_feature(), CHECKS, code_feature(passes=ASSERTS, timeout=5, memory=64, reads="text")]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: str(feature.spec))
def test_the_run_files_form_makes_it_again(feature: Feature) -> None:
    assert pickle.loads(pickle.dumps(feature)) == feature
    for one in (feature, feature.renamed("works")):
        assert build_feature(json.loads(json.dumps(run_file_form(one)))) == one
    assert feature([]).shape == (0,)


def test_short_and_long_forms_of_a_run_file() -> None:
    assert build_feature("code:compiles") == build_feature({"code": "compiles"}) == code_feature()
    assert build_feature({"code": {"passes": ASSERTS, "timeout": 2, "memory": 256}}) == CHECKS
    assert (code_feature().name, CHECKS.name) == ("compiles", "passes tests")
    assert code_feature().binary
    assert CHECKS.binary


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"code": "compile"}, r"code\.check: 'compile' is not known; did you mean 'compiles'\?.* or 'passes' with"),
        ({"code": {"pases": "x"}}, "code: unknown option 'pases'; did you mean 'passes'"),
        ({"code": {"passes": "no/such_tests.py"}}, r"code\.passes: cannot read 'no/such_tests.py': No such file"),
        ({"code": {"passes": "assert f(2) = 4"}}, r"code\.passes: the tests do not compile: .* \(line 1\)"),
        ({"code": {"passes": " "}}, r"code\.passes: expected a file of tests or the tests themselves, got ' '"),
        ({"code": {"passes": ["assert f"]}}, "expected a file of tests"),
        ({"code": {"passes": ASSERTS, "timeout": 0}}, r"code\.timeout: expected seconds above 0, got 0"),
        ({"code": {"passes": ASSERTS, "timeout": True}}, "got True"),
        ({"code": {"passes": ASSERTS, "memory": 1}}, r"code\.memory: .*at least 32, got 1"),
        ({"code": {"passes": ASSERTS, "memory": 64.5}}, "got 64.5"),
        ({"code": {"passes": ASSERTS, "reads": "prompt"}}, r"code\.reads: 'prompt' is not known; .*completion, text"),
    ],
)  # fmt: skip
def test_a_wrong_spec_says_what_to_change(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_feature(spec)
