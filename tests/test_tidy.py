"""The rules for code that no linter knows. Each check is shown to fail on bad code first."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, NewType

import pytest

import flexkv
from tests.tidy import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    PACKAGE,
    PURE,
    ROOT,
    complaints,
    impure_imports,
    is_documented,
    loaded_by,
    long_files,
    long_functions,
    paths_of_one_machine,
    python_files,
    says_nothing,
    tasks_without_owner,
    too_broad_excepts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# The project keeps them.


def test_functions_fit_on_a_screen() -> None:
    files = python_files("flexkv", "tests", "benchmarks", "examples")
    assert complaints(long_functions, files) == []


def test_files_fit_in_one_head() -> None:
    assert long_files(python_files("flexkv")) == []


def test_module_names_say_something() -> None:
    modules = [*PACKAGE.rglob("*.py"), *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    assert [path for path in modules if says_nothing(path)] == []


def test_nobody_catches_everything() -> None:
    assert complaints(too_broad_excepts, python_files("flexkv")) == []


def test_every_task_has_an_owner() -> None:
    assert complaints(tasks_without_owner, python_files("flexkv")) == []


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_stay_pure(module: str) -> None:
    assert complaints(impure_imports, [ROOT / (module.replace(".", "/") + ".py")]) == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are ours is not known")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files
    wrong = {
        str(file.relative_to(ROOT)): list(paths_of_one_machine(file.read_text(errors="replace")))
        for file in files
        if file.is_file()
    }
    assert {file: lines for file, lines in wrong.items() if lines} == {}


# The public names.


def test_public_names_exist_and_are_documented() -> None:
    assert flexkv.__all__
    assert sorted(set(flexkv.__all__)) == sorted(flexkv.__all__)
    things = {name: getattr(flexkv, name, None) for name in flexkv.__all__ if name[0] != "_"}
    # A NewType or a union can't carry a docstring; the line below it in the source does.
    typed = {
        name: thing for name, thing in things.items() if not isinstance(thing, NewType | UnionType)
    }
    assert [name for name, thing in typed.items() if not is_documented(name, thing)] == []
    assert [name for name, thing in things.items() if thing is None] == []


def test_importing_flexkv_needs_no_server_and_no_gpu() -> None:
    loaded = loaded_by("import flexkv")
    assert "flexkv" in loaded
    assert {"vllm", "dynamo", "torch.cuda"} & set(loaded) == set()


# Every check can fail.

BAD_EXCEPTS = """
try: pass
except: pass
try: pass
except Exception: raise
try: pass
except (ValueError, builtins.Exception): pass
try: pass
except BaseException: log()
with contextlib.suppress(Exception): pass
"""
GOOD_EXCEPTS = """
try: pass
except ValueError: pass
try: pass
except BaseException:
    undo()
    raise
with suppress(ValueError): pass
"""
BAD_TASKS = """
from asyncio import create_task as start
asyncio.create_task(x)
asyncio.ensure_future(x)
start(x)
loop.create_task(x)
self._loop.create_task(x)
asyncio.get_running_loop().create_task(x)
"""
GOOD_TASKS = """
async with asyncio.TaskGroup() as tasks:
    tasks.create_task(x)
self._tasks.create_task(x)
"""
BAD_IMPORTS = """
import asyncio.events
from time import monotonic
import numpy, threading
def f():
    import random
if TYPE_CHECKING:
    pass
else:
    from concurrent.futures import Future
"""
GOOD_IMPORTS = """
import numpy
from flexkv.errors import time
if TYPE_CHECKING:
    import asyncio
"""


@pytest.mark.parametrize(
    ("check", "bad", "num_complaints", "good"),
    [
        (too_broad_excepts, BAD_EXCEPTS, 5, GOOD_EXCEPTS),
        (tasks_without_owner, BAD_TASKS, 6, GOOD_TASKS),
        (impure_imports, BAD_IMPORTS, 5, GOOD_IMPORTS),
        (
            long_functions,
            "async def f():\n" + "    x\n" * MAX_FUNCTION_LINES,
            1,
            "def f():\n" + "    x\n" * (MAX_FUNCTION_LINES - 1),
        ),
    ],
)
def test_the_check_complains_of_bad_code_only(
    check: Callable[[ast.Module], Iterator[str]], bad: str, num_complaints: int, good: str
) -> None:
    assert len(list(check(ast.parse(bad)))) == num_complaints
    assert list(check(ast.parse(good))) == []


def test_the_check_of_files_complains_of_long_ones_only(tmp_path: Path) -> None:
    for num_lines in (MAX_FILE_LINES, MAX_FILE_LINES + 1):
        (tmp_path / f"{num_lines}.py").write_text("x\n" * num_lines)
    assert long_files(sorted(tmp_path.iterdir())) == [f"{tmp_path}/401.py has 401 lines"]


def test_the_check_of_names_complains_of_empty_words_only() -> None:
    assert says_nothing(Path("flexkv/block_manager.py"))
    assert says_nothing(Path("flexkv/utils"))
    assert not says_nothing(Path("flexkv/engine/planner.py"))


def test_the_check_of_paths_complains_of_one_machines_folders_only() -> None:
    folders = ["work", "root", "home/alice"]
    for folder in folders:
        assert list(paths_of_one_machine(f"see /{folder}/notes.md"))
    assert list(paths_of_one_machine("see .." + "/shared/notes.md"))
    fine = "tmp/root/x https://example.com/root/ /data/flexkv_ssd/ /proc/1/root/ workspace"
    assert list(paths_of_one_machine(fine)) == []


def test_the_check_of_docstrings_complains_of_made_up_ones() -> None:
    class Bare:
        pass

    class Documented:
        """What becomes true."""

    Bare.__doc__ = "Bare(x: int)"
    assert not is_documented("Bare", Bare)
    assert not is_documented("seven", 7)
    assert is_documented("Documented", Documented)
    assert not is_documented("f", lambda: None)


def test_the_check_of_imports_sees_what_a_statement_loads() -> None:
    assert "dynamo" in loaded_by("import dynamo.runtime")
