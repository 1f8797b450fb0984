"""`make mutants`: breaks random places in domain/ and services/, and prints those that no test noticed.

Not part of `make test`: each mutant runs unit tests in a copy of the tree, 100 of them take about an hour.
A survivor is a place that no test holds; some survivors mean the same as the code (equivalent mutants).
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tests.tools.console import say

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
_PLACES = ("manager/domain", "manager/services")
_TESTS = ("tests/unit/domain", "tests/unit/services", "tests/unit/relay", "tests/unit/api")
_LIMIT_S = 600
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed place: the `number`-th node of a file that can be changed."""

    file: str
    line: int
    number: int
    what: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="the same seed breaks the same places")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    say(f"seed {seed}")
    found = [mutant for place in _PLACES for file in _files(place) for mutant in _mutants(file)]
    chosen = random.Random(seed).sample(found, min(options.count, len(found)))
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.side_by_side):
            copies.put(_copy(Path(folder, str(number))))
        with ThreadPoolExecutor(options.side_by_side) as pool:
            outcomes = pool.map(lambda one: _survives(one, copies), chosen)
            for number, (mutant, lives) in enumerate(zip(chosen, outcomes, strict=True), 1):
                say(f"{number:4} {'SURVIVED' if lives else 'noticed '} {_shown(mutant)}")
                survivors += [mutant] if lives else []
    print(f"{len(survivors)} of {len(chosen)} survived (seed {seed})")
    for mutant in survivors:
        print(f"  {_shown(mutant)}")
    return 1 if survivors else 0


def _files(place: str) -> Iterator[str]:
    yield from sorted(str(path.relative_to(ROOT)) for path in (ROOT / place).rglob("*.py"))


def _mutants(file: str) -> Iterator[Mutant]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for number, node in enumerate(_places(tree)):
        yield Mutant(file, node.lineno, number, type(node).__name__)


def _places(tree: ast.Module) -> Iterator[ast.Compare | ast.BoolOp | ast.BinOp | ast.UnaryOp | ast.Constant]:
    """The nodes inside functions that can be changed, in the order of the tree."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                if (
                    (isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED)
                    or isinstance(node, ast.BoolOp)
                    or (isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED)
                    or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
                    or (isinstance(node, ast.Constant) and isinstance(node.value, bool))
                ):
                    yield node


def _broken(mutant: Mutant) -> str:
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    node = next(node for number, node in enumerate(_places(tree)) if number == mutant.number)
    match node:
        case ast.Compare():
            node.ops[0] = _SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
        case ast.BoolOp() | ast.BinOp():
            node.op = _SWAPPED[type(node.op)]()  # type: ignore[assignment]
        case ast.UnaryOp():
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
        case ast.Constant():
            node.value = not node.value
    return ast.unparse(ast.fix_missing_locations(tree))


def _copy(folder: Path) -> Path:
    for name in ("manager", "tests", "templates", "docs", "compose"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def _survives(mutant: Mutant, copies: SimpleQueue[Path]) -> bool:
    copy = copies.get()
    file = copy / mutant.file
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text(_broken(mutant), encoding="utf-8")
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:randomly",
                "-p",
                "no:cacheprovider",
                *_TESTS,
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        file.write_text(whole, encoding="utf-8")
        copies.put(copy)
    return result.returncode == 0


def _shown(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line} ({mutant.what})"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
