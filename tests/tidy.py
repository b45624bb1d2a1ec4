"""The checks behind test_tidy: each yields "line: what is wrong" with one piece of code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flexkv"

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
NAMES_THAT_SAY_NOTHING = {"utils", "util", "manager", "helpers", "helper", "misc", "common"}

_contracts = ConfigParser()
_contracts.read(ROOT / ".importlinter")
PURE = _contracts["importlinter:contract:pure"]["source_modules"].split()
IMPURE = set(_contracts["importlinter:contract:pure"]["forbidden_modules"].split())


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def long_files(files: list[Path]) -> list[str]:
    lengths = ((file, len(file.read_text().splitlines())) for file in files)
    return [f"{file} has {length} lines" for file, length in lengths if length > MAX_FILE_LINES]


def says_nothing(path: Path) -> bool:
    return bool(NAMES_THAT_SAY_NOTHING & set(path.stem.split("_")))


def long_functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {num_lines} lines"


def too_broad_excepts(tree: ast.Module) -> Iterator[str]:
    """Also what hides in a tuple or in contextlib.suppress."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = names_in(node.type)
            if node.type is None or "Exception" in names:
                yield f"{node.lineno}: catches everything"
            elif "BaseException" in names and not isinstance(node.body[-1], ast.Raise):
                yield f"{node.lineno}: except BaseException does not end with raise"
        elif isinstance(node, ast.Call) and last_name(node.func) == "suppress":
            caught = {name for arg in node.args for name in names_in(arg)}
            if caught & {"Exception", "BaseException"}:
                yield f"{node.lineno}: suppresses everything"


def tasks_without_owner(tree: ast.Module) -> Iterator[str]:
    """Tasks belong to a TaskGroup: asyncio's own functions and a loop's method give them none."""
    from_asyncio = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "asyncio"
        for alias in node.names
        if alias.name in {"create_task", "ensure_future"}
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = last_name(node.func)
        if isinstance(node.func, ast.Name):
            ownerless = called in from_asyncio
        elif isinstance(node.func, ast.Attribute):
            owner = last_name(node.func.value)
            ownerless = called == "ensure_future" or (
                called == "create_task" and (owner == "asyncio" or owner.endswith("loop"))
            )
        else:
            ownerless = False
        if ownerless:
            yield f"{node.lineno}: {called} outside a TaskGroup"


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported top-level package, but for what only a type checker sees."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not our habit"
            yield node.lineno, (node.module or "").split(".")[0]
        else:
            todo += ast.iter_child_nodes(node)


def impure_imports(tree: ast.Module) -> Iterator[str]:
    for line, package in imports_of(tree):
        if package in IMPURE:
            yield f"{line}: a pure module imports {package}"


def paths_of_one_machine(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"(?<![\w.*}])/(?:work|root|home/\w+)/|\.\./shared/", line):
            yield f"{number}: {line.strip()[:80]}"


def names_in(node: ast.expr | None) -> set[str]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node] if node else []
    return {last_name(part) for part in parts}


def last_name(node: ast.expr) -> str:
    """``loop`` of ``self._x.loop``, and ``get_running_loop`` of ``asyncio.get_running_loop()``."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def complaints(check: Callable[[ast.Module], Iterator[str]], files: list[Path]) -> list[str]:
    assert files, "nothing was checked"
    return [
        f"{file.relative_to(ROOT)}:{complaint}"
        for file in files
        for complaint in check(ast.parse(file.read_text()))
    ]


def is_documented(name: str, thing: object) -> bool:
    """Has a docstring of its own: not its class's, nor what @dataclass makes up."""
    if isinstance(thing, type):
        own, borrowed = thing.__dict__.get("__doc__"), None
    else:
        own, borrowed = getattr(thing, "__doc__", None), type(thing).__doc__
    return bool(own) and own != borrowed and not str(own).startswith(f"{name}(")


def loaded_by(statement: str) -> list[str]:
    """The top-level packages, and torch.cuda if it is initialised, after ``statement``."""
    program = f"""
import json, sys
{statement}
loaded = {{name.split(".")[0] for name in sys.modules}}
if "torch" in loaded and sys.modules["torch"].cuda.is_initialized():
    loaded.add("torch.cuda")
print(json.dumps(sorted(loaded)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names
