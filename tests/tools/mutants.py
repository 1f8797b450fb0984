"""`make mutants`: break random places in domain/ and services/, and print those that no unit test noticed.

Not part of `make test`: 100 mutants take some minutes, `--count 0` breaks every place.

pytest collects the unit tests once, in this process. One forked child runs all of them and records which test
runs which line. For each mutant another child replaces the code of one function and runs the tests that reach
the changed place, the quickest first, until one fails. No file is changed.

A survivor is a place that no test holds. Places whose change no unit test needs to see are skipped
(annotations, log lines, assertions, `strict=`); some survivors mean the same as the code nevertheless.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import pickle
import random
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import coverage
import pytest

from tests.tools.console import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
_PLACES = ("manager/domain", "manager/services")
_TESTS = ("tests/unit/domain", "tests/unit/services", "tests/unit/relay", "tests/unit/api")
# A mutant that hangs is noticed after this time and some multiples of what its tests take.
_LEAST_LIMIT_S = 10.0
_SLOWER = 3.0
_DEFECT = 70  # the exit code of a child that could not do its work
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
}  # fmt: skip
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Node = ast.Compare | ast.BoolOp | ast.BinOp | ast.UnaryOp | ast.Constant


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed place: the `number`-th node of a file that can be changed."""

    file: str
    number: int
    line: int
    end: int
    function: tuple[int, int]
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.what})"


@dataclass(frozen=True, slots=True)
class Reach:
    """Which tests run which lines, and how long each test takes.

    Attributes:
        failing: tests that fail without any mutant, such as those of speed: they notice nothing.
    """

    lines: dict[str, dict[int, set[str]]]
    duration_s: dict[str, float]
    failing: list[str]

    def tests(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the function: those of the changed line first, then the quickest.

        All of them: coverage misses some lines of coroutines in a long run.
        """
        lines = self.lines.get(mutant.file, {})
        exact = _between(lines, mutant.line, mutant.end)
        own = f"test_{Path(mutant.file).name}::"
        return sorted(
            exact | _between(lines, *mutant.function),
            key=lambda test: (test not in exact, own not in test, self.duration_s[test]),
        )


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that runs the tests of one mutant, until `limit` at most."""

    pid: int
    limit: float
    number: int
    mutant: Mutant
    tests: int


class Loop:
    """A plugin of pytest: break one place after another instead of running the collected tests once."""

    def __init__(self, mutants: Sequence[Mutant], side_by_side: int) -> None:
        self._mutants = mutants
        self._side_by_side = side_by_side
        self.survivors: list[Mutant] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings  # noqa: PLC0415 - pytest must be the first to import it

        # A failure is enough: its smallest example is not searched.
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutants", deadline=None, database=None, phases=phases)
        settings.load_profile("mutants")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Failed("the tests cannot be collected")
        items = {item.nodeid: item for item in session.items}
        reach = _reach(session)
        functions = _product_functions()
        gc.freeze()  # a child that collects garbage must not copy all pages
        waiting = deque(enumerate(self._mutants, 1))
        running: dict[int, _Child] = {}
        with selectors.DefaultSelector() as ends:
            try:
                while waiting or running:
                    while waiting and len(running) < self._side_by_side:
                        number, mutant = waiting.popleft()
                        tests = [items[test] for test in reach.tests(mutant)]
                        usual_s = sum(reach.duration_s[test.nodeid] for test in tests)
                        limit = time.monotonic() + _LEAST_LIMIT_S + _SLOWER * usual_s
                        pid = _forked(partial(_noticed, mutant, tests, functions))
                        ended = os.pidfd_open(pid)
                        running[ended] = _Child(pid, limit, number, mutant, len(tests))
                        ends.register(ended, selectors.EVENT_READ)
                    for key, _ in ends.select(timeout=1.0):
                        ends.unregister(key.fd)
                        os.close(key.fd)
                        self._note(running.pop(key.fd))
                    for child in running.values():
                        if time.monotonic() > child.limit:
                            os.kill(child.pid, signal.SIGKILL)
            finally:
                for child in running.values():
                    os.kill(child.pid, signal.SIGKILL)
        return True

    def _note(self, child: _Child) -> None:
        code = _exit_code(child.pid)
        if code == _DEFECT:
            raise RuntimeError(f"{child.mutant} cannot be tried")
        if code == 0:
            self.survivors.append(child.mutant)
        outcome = "SURVIVED" if code == 0 else "noticed "
        say(f"{child.number:4} {outcome} {child.mutant}, run by {child.tests} tests")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="0: every place")
    parser.add_argument("--seed", type=int, default=None, help="the same seed breaks the same places")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--at", action="append", metavar="FILE:LINE", help="break this line, nothing random")
    parser.add_argument("--under", default="manager", help="break only files below this folder")
    parser.add_argument("--tests", nargs="+", help="run these tests instead of those of the data path")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    say(f"seed {seed}")
    found = [mutant for place in _PLACES for file in _files(place) for mutant in _mutants(file)]
    if options.at:
        chosen = [mutant for mutant in found if f"{mutant.file}:{mutant.line}" in options.at]
    else:
        found = [mutant for mutant in found if mutant.file.startswith(options.under)]
        chosen = random.Random(seed).sample(found, min(options.count or len(found), len(found)))
    loop = Loop(chosen, options.side_by_side)
    os.chdir(ROOT)
    ended = pytest.main(
        ["-p", "no:terminal", "-p", "no:randomly", "-p", "no:cacheprovider", "-s",
         "-o", "addopts=--strict-markers --import-mode=importlib", *(options.tests or _TESTS)],
        plugins=[loop],
    )  # fmt: skip
    if ended != pytest.ExitCode.OK:
        say(f"pytest ended with {ended!r}")
        return 2
    print(f"{len(loop.survivors)} of {len(chosen)} survived (seed {seed})")
    for mutant in sorted(loop.survivors, key=lambda one: (one.file, one.number)):
        print(f"  {mutant}")
    return 1 if loop.survivors else 0


def _files(place: str) -> Iterator[str]:
    yield from sorted(str(path.relative_to(ROOT)) for path in (ROOT / place).rglob("*.py"))


def _mutants(file: str) -> Iterator[Mutant]:
    for number, (function, node) in enumerate(_places(_parsed(file))):
        span = (function.lineno, function.end_lineno or function.lineno)
        yield Mutant(file, number, node.lineno, node.end_lineno or node.lineno, span, type(node).__name__)


@cache
def _parsed(file: str) -> ast.Module:
    """Return the file as it was at first: it may be edited while the tool runs."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _places(tree: ast.Module) -> Iterator[tuple[_Function, _Node]]:
    """Yield each node inside a function that can be changed, once, with the outermost function around it."""
    for function in _functions(tree):
        for statement in function.body:
            for node in _changeable(statement):
                yield function, node


def _functions(node: ast.AST) -> Iterator[_Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        else:
            yield from _functions(child)


def _changeable(node: ast.AST) -> Iterator[_Node]:
    if _is_invisible(node):
        return
    match node:
        case ast.Compare(ops=[first, *_]) if type(first) in _SWAPPED:
            yield node
        case ast.BoolOp() | ast.UnaryOp(op=ast.Not()) | ast.Constant(value=bool()):
            yield node
        case ast.BinOp(op=op) if type(op) in _SWAPPED:
            yield node
    for name, value in ast.iter_fields(node):
        if name not in {"annotation", "returns"}:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changeable(child)


def _is_invisible(node: ast.AST) -> bool:
    """Return whether no unit test needs to see a change in here."""
    match node:
        case ast.Assert() | ast.keyword(arg="strict" | "exc_info"):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="_log")))):
            return True
        case ast.Call(func=ast.Name(id="cast")):
            return True
    return False


def _product_functions() -> dict[tuple[str, int, str], list[FunctionType]]:
    """Return the functions of manager/ by the place of their code; a decorator may have made several."""
    found: dict[tuple[str, int, str], list[FunctionType]] = {}
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and one.__code__.co_filename.startswith(str(ROOT / "manager")):
            found.setdefault(_place_of(one.__code__), []).append(one)
    return found


def _break(mutant: Mutant, functions: dict[tuple[str, int, str], list[FunctionType]]) -> None:
    """Give the function around the place its changed code, wherever the function is referred to."""
    tree = _parsed(mutant.file)
    function, node = next(pair for number, pair in enumerate(_places(tree)) if number == mutant.number)
    match node:
        case ast.Compare():
            node.ops[0] = _SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
        case ast.BoolOp() | ast.BinOp():
            node.op = _SWAPPED[type(node.op)]()  # type: ignore[assignment]
        case ast.UnaryOp():
            node.operand = ast.copy_location(ast.UnaryOp(ast.Not(), node.operand), node)
        case ast.Constant():
            node.value = not node.value
    path = str(ROOT / mutant.file)
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    code = next(
        one
        for one in _codes(compile(tree, path, "exec"))
        if one.co_firstlineno == first and one.co_name == function.name
    )
    for one in functions[_place_of(code)]:
        one.__code__ = code


def _place_of(code: CodeType) -> tuple[str, int, str]:
    return code.co_filename, code.co_firstlineno, code.co_qualname


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _reach(session: pytest.Session) -> Reach:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        file = Path(folder, "reach")
        if _exit_code(_forked(lambda: _recorded(session.items, file))) != 0:
            raise session.Failed("the tests could not be run without any mutant")
        reach = pickle.loads(file.read_bytes())
    if not isinstance(reach, Reach):
        raise TypeError(type(reach))
    for test in reach.failing:
        say(f"fails without any mutant, and is left out: {test}")
    return reach


def _recorded(items: Sequence[pytest.Item], file: Path) -> int:
    places = [str(ROOT / place / "*") for place in _PLACES]
    watch = coverage.Coverage(data_file=None, config_file=False, include=places)
    watch.start()
    duration_s: dict[str, float] = {}
    failing: list[str] = []
    for item, next_item in _pairs(items):
        watch.switch_context(item.nodeid)
        begun = time.monotonic()
        if _passes(item, next_item):
            duration_s[item.nodeid] = time.monotonic() - begun
        else:
            failing.append(item.nodeid)
    watch.stop()
    data = watch.get_data()
    lines = {}
    for path in data.measured_files():
        tests = data.contexts_by_lineno(path)
        lines[str(Path(path).relative_to(ROOT))] = {
            line: duration_s.keys() & frozenset(names) for line, names in tests.items()
        }
    file.write_bytes(pickle.dumps(Reach(lines, duration_s, failing)))
    return 0


def _noticed(
    mutant: Mutant, items: Sequence[pytest.Item], functions: dict[tuple[str, int, str], list[FunctionType]]
) -> int:
    _break(mutant, functions)
    return 0 if all(_passes(item, next_item) for item, next_item in _pairs(items)) else 1


def _passes(item: pytest.Item, next_item: pytest.Item | None) -> bool:
    before = item.session.testsfailed
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
    return item.session.testsfailed == before


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip_longest(items, items[1:])


def _forked(work: Callable[[], int]) -> int:
    """Run in a child, without its output; return its process id."""
    child = os.fork()
    if child:
        return child
    code = _DEFECT
    try:
        with Path(os.devnull).open("w") as nothing:
            shown = os.dup(2)
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        code = work()
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        os.write(shown, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _between(lines: dict[int, set[str]], first: int, last: int) -> set[str]:
    return set().union(*(tests for line, tests in lines.items() if first <= line <= last))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
