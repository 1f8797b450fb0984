"""Workloads of benchmarks: those that are shipped, and the operator's own, a YAML file for each."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from manager.domain.benchmarks import Check, CheckKind, Prompt, Workload
from manager.settings.problems import described, dotted
from manager.settings.section import Number, Section, Text, WholeNumber
from manager.settings.yaml_file import read_document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# The workloads that the project ships.
SHIPPED_WORKLOADS = Path(__file__).with_name("workloads")
MOST_FILES = 100
MOST_PROMPTS = 50
MOST_CHECKS = 20
# Problems of one file that are told at once.
_MOST_PROBLEMS = 5
_KINDS = ", ".join(CheckKind)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression of Python: {error}") from None
    return text


_Texts = Annotated[tuple[Annotated[Text, Field(max_length=1000)], ...], Field(min_length=1, max_length=50)]
_Short = Annotated[Text, Field(max_length=1000)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class _CheckFile(Section):
    """One check, with exactly one of its keys."""

    contains: _Short | None = None
    any_of: _Texts | None = None
    equals: _Short | None = None
    regex: Annotated[_Short, AfterValidator(_pattern)] | None = None
    max_words: Annotated[WholeNumber, Field(ge=1, le=100_000)] | None = None
    json_: Annotated[StrictBool | _Texts | None, Field(alias="json")] = None

    @model_validator(mode="after")
    def _has_one_key(self) -> _CheckFile:
        if len(self.model_fields_set) != 1 or self.value in (None, False):
            raise PydanticCustomError("check", "expected exactly one of {kinds}", {"kinds": _KINDS})
        return self

    @property
    def value(self) -> Any:
        return next((getattr(self, name) for name in self.model_fields_set), None)

    @property
    def check(self) -> Check:
        (name,) = self.model_fields_set
        return Check(CheckKind(name.rstrip("_")), self.value)


class _PromptFile(Section):
    name: _Name
    text: Annotated[Text, Field(max_length=20_000)]
    system: Annotated[Text, Field(max_length=20_000)] | None = None
    checks: Annotated[tuple[_CheckFile, ...], Field(min_length=1, max_length=MOST_CHECKS)]

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.name, self.text, tuple(one.check for one in self.checks), self.system)


class WorkloadFile(Section):
    """A file with a workload, as it is written."""

    name: _Name
    description: Annotated[str, Field(max_length=1000)] = ""
    temperature: Annotated[Number, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[WholeNumber, Field(ge=1, le=100_000)] = 256
    prompts: Annotated[tuple[_PromptFile, ...], Field(min_length=1, max_length=MOST_PROMPTS)]

    @model_validator(mode="after")
    def _has_names_once(self) -> WorkloadFile:
        names = [one.name for one in self.prompts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PydanticCustomError("twice", "the prompt {name} is there twice", {"name": repr(twice)})
        return self

    @property
    def workload(self) -> Workload:
        prompts = tuple(one.prompt for one in self.prompts)
        return Workload(self.name, prompts, self.description, self.temperature, self.max_tokens)


def read_workloads(own: Path | None) -> Mapping[str, Workload]:
    """Return the workloads by name: the shipped ones, and the operator's, which replace those of their name.

    Args:
        own: a file, or a directory whose files `*.yaml` and `*.yml` are read; None is no own ones.

    Raises:
        OSError: a file or the directory cannot be read.
        ValueError: a file has no workload; the message has file, line and field.
    """
    found = {one.name: one for one in _read_all(_files(SHIPPED_WORKLOADS))}
    if own is not None:
        found |= {one.name: one for one in _read_all(_files(own))}
    return MappingProxyType(dict(sorted(found.items())))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    names = sorted(one for one in path.iterdir() if one.suffix in (".yaml", ".yml"))
    found = [one for one in names if not one.name.startswith(".")]
    if not found:
        raise ValueError(f"{str(path)!r} has no file *.yaml; expected a file for each workload")
    if len(found) > MOST_FILES:
        raise ValueError(f"{str(path)!r} has {len(found)} files; at most {MOST_FILES} are read")
    return found


def _read_all(files: Sequence[Path]) -> list[Workload]:
    found: dict[str, Path] = {}
    workloads = []
    for file in files:
        status = file.stat()
        workload = _read(file, status.st_mtime_ns, status.st_size)
        other = found.setdefault(workload.name, file)
        if other is not file:
            raise ValueError(f"{file}:1: name: {workload.name!r} is the name of {other}, too")
        workloads.append(workload)
    return workloads


@lru_cache(maxsize=2 * MOST_FILES)
def _read(file: Path, _mtime_ns: int, _size: int) -> Workload:
    document = read_document(file, regular=True)
    if document.data is None or document.problems:
        raise ValueError("; ".join(map(str, document.problems)) or f"{file} has no workload")
    try:
        return WorkloadFile.model_validate(document.data).workload
    except ValidationError as error:
        problems = [
            f"{document.place(path)}: {dotted(path)}: {message}" if path else f"{file}:1: {message}"
            for one in error.errors()
            for path, message in described(one, WorkloadFile)
        ]
        raise ValueError("; ".join(problems[:_MOST_PROBLEMS])) from None
