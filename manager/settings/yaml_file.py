"""YAML as configuration needs it: plain data, a line number for every key, and no surprises.

Scalars follow the core schema of YAML 1.2: `yes`, `on` and `08:30` are text, and so is the PCI bus id
`0000:01:00.0`, which YAML 1.1 reads as the number 60 in base sixty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
import yaml.reader

from manager.settings.ownership import open_regular
from manager.settings.problems import Problem, dotted

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings.schema import KeyPath

_LARGEST_FILE = 2**20
_MOST_NODES = 20_000  # aliases let a small file describe a huge tree
_DEEPEST = 32

_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"  # a scalar without quotes and without a tag: the only kind that is looked at more closely
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


@dataclass(slots=True)
class Document:
    """One file: its data, where each key stands, how each scalar was spelt, and what is wrong with it.

    `data` is None when the file cannot be understood at all; it may be usable although there are problems.
    """

    file: str
    data: dict[str, Any] | None = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """FILE:LINE of a key, or of the nearest thing around it that the file has."""
        for end in range(len(path), 0, -1):
            if (line := self.lines.get(path[:end])) is not None:
                return f"{self.file}:{line}"
        return f"{self.file}:1"

    def refuse(self, line: int, path: KeyPath, text: str) -> None:
        self.problems.append(Problem(f"{self.file}:{line}", dotted(path), text))


def read_document(file: Path, *, regular: bool = False) -> Document:
    """Read a file. Whatever is wrong with its text is in the document's `problems`.

    Args:
        file: the file.
        regular: refuse a FIFO, which a file that was only found might be, and for which reading waits.

    Raises:
        OSError: it cannot be read.
    """
    document = Document(str(file))
    with open(open_regular(file) if regular else file, "rb") as stream:  # noqa: PTH123
        raw = stream.read(_LARGEST_FILE + 1)
    if len(raw) > _LARGEST_FILE:
        document.refuse(1, (), f"too large; at most {_LARGEST_FILE} bytes are read")
        return document
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document.refuse(raw.count(b"\n", 0, error.start) + 1, (), "not UTF-8 text")
        return document
    try:
        _parse(text, document)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.refuse(line, (), f"not YAML: {error.reason}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        about = ", ".join(part for part in (error.context, error.problem) if part)
        document.refuse(mark.line + 1 if mark else 1, (), f"not YAML: {about}")
    except RecursionError:
        document.refuse(1, (), f"nested too deeply; at most {_DEEPEST} levels")
    if document.problems and any(not one.key for one in document.problems):
        document.data = None
    return document


class _Loader(yaml.SafeLoader):
    """PyYAML's parser; what a scalar means is decided here, not by YAML 1.1."""


_Loader.yaml_implicit_resolvers = {None: [(_PLAIN, re.compile(""))]}


def _parse(text: str, document: Document) -> None:
    loader = _Loader(text)
    try:
        node = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            start = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
            document.refuse(start.line + 1, (), "a second document; expected one document a file")
            return
    finally:
        loader.dispose()
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN and not node.value):
        document.data = {}
        return
    data = _Reader(document).value(node, ())
    if isinstance(data, dict):
        document.data = data
    elif not document.problems:
        document.refuse(node.start_mark.line + 1, (), "expected a mapping of keys to values")


class _Reader:
    """Turns nodes into data, writing lines and problems into the document as it goes."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(path) > _DEEPEST:
            limit = f"at most {_DEEPEST} levels and {_MOST_NODES} values"
            raise yaml.MarkedYAMLError(None, None, f"it unfolds too far, {limit}", node.start_mark)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return self._sequence(node, path)
        if isinstance(node, yaml.ScalarNode) and node.tag in {_PLAIN, f"{_TAG}str"}:
            self._document.texts[path] = node.value
            return _plain_scalar(node.value) if node.tag == _PLAIN else node.value
        tag = node.tag.replace(_TAG, "!!")
        self._document.refuse(
            node.start_mark.line + 1, path, f"the tag {tag}; expected a value without a tag"
        )
        return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in {_PLAIN, f"{_TAG}str"}:
                self._document.refuse(line, path, "a key that is not text; expected a plain name")
                continue
            key = key_node.value
            here = (*path, key)
            if key == "<<" and key_node.tag == _PLAIN:
                self._document.refuse(line, here, "merge keys are not read; expected the keys themselves")
            elif key in data:
                first = self._document.lines[here]
                self._document.refuse(
                    line, here, f"given twice, first in line {first}; expected each key once"
                )
            else:
                self._document.lines[here] = line
                data[key] = self.value(value_node, here)
        return data

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            here = (*path, index)
            self._document.lines[here] = item.start_mark.line + 1
            items.append(self.value(item, here))
        return items


def _plain_scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
