"""The section `routing` of the configuration: the choice of a model by the daemon, and scores."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StrictBool, ValidationError

from manager.domain.classification import AutoRules, Lexicon, Task, Tier
from manager.domain.scoring import DEFAULT_WEIGHTS, Weights
from manager.settings.learned import read_learned
from manager.settings.section import Number, Section, Text
from manager.settings.yaml_file import read_document

# The words that the project ships.
SHIPPED = Path(__file__).with_name("task_words.yaml")
MOST_TASKS = 100
MOST_WORDS = 2000
MOST_WEIGHT = 100.0

_Words = Annotated[tuple[Annotated[Text, Field(max_length=200)], ...], Field(max_length=MOST_WORDS)]


class _TaskWords(Section):
    tier: Tier
    words: Annotated[_Words, Field(min_length=1)]


class TaskWords(Section):
    """A file of words, as it is written."""

    tasks: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")], _TaskWords],
        Field(min_length=1, max_length=MOST_TASKS),
    ]
    more: _Words = ()
    less: _Words = ()

    @property
    def lexicon(self) -> Lexicon:
        """The words, ready to be looked up.

        Raises:
            ValueError: an entry has no word, or too short a stem.
        """
        tasks = (Task(name, one.tier, one.words) for name, one in self.tasks.items())
        return Lexicon(tuple(tasks), self.more, self.less)


MOST_MODELS = 8


class EnsembleSettings(Section):
    """Models or roles that all answer, and the one that chooses the best answer."""

    models: Annotated[
        tuple[Annotated[Text, Field(max_length=512)], ...], Field(min_length=2, max_length=MOST_MODELS)
    ]
    judge: Annotated[Text, Field(max_length=512)]


def _words_file(path: Path) -> Path:
    try:
        read_words(path)
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error.strerror}); expected a file of words"
        ) from error
    return path


def _learned_file(path: Path) -> Path:
    try:
        read_learned(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); expected what `classifier train` has written"
        raise ValueError(f"{str(path)!r} {problem}") from error
    return path


_Weight = Annotated[Number, Field(ge=0, le=MOST_WEIGHT)]


class WeightsSettings(Section):
    """The shares of the signals in a score, see `domain.scoring.Signals`; 0 leaves a signal out."""

    text: _Weight = DEFAULT_WEIGHTS.text
    family: _Weight = DEFAULT_WEIGHTS.family
    loaded: _Weight = DEFAULT_WEIGHTS.loaded
    latency: _Weight = DEFAULT_WEIGHTS.latency
    throughput: _Weight = DEFAULT_WEIGHTS.throughput
    queue: _Weight = DEFAULT_WEIGHTS.queue
    benchmark: _Weight = DEFAULT_WEIGHTS.benchmark

    @property
    def values(self) -> Weights:
        """The weights as scores take them."""
        return Weights(**self.model_dump())


class RoutingSection(Section):
    """`auto` has `model: auto` understood. `words` is a file in place of the one that is shipped.

    A classification that is less sure than `escalate_below`, from 0 to 1, moves one tier up; 0 moves none.
    Without `ensemble` there are no ensembles. `learned` is the file of a classifier that is better than the
    words.
    `weights` are those of the roles whose strategy is `scored`.
    """

    auto: StrictBool = False
    words: Annotated[Path, AfterValidator(_words_file)] | None = None
    escalate_below: Annotated[Number, Field(ge=0, le=1)] = 0.0
    ensemble: EnsembleSettings | None = None
    learned: Annotated[Path, AfterValidator(_learned_file)] | None = None
    weights: WeightsSettings = Field(default_factory=WeightsSettings)

    @property
    def rules(self) -> AutoRules:
        """The rules in force."""
        learned = None if self.learned is None else read_learned(self.learned)
        words = read_words(self.words or SHIPPED)
        return AutoRules(words, self.escalate_below, is_on=self.auto, learned=learned)


def read_words(path: Path) -> Lexicon:
    """Read a file of words.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; the message says what and where.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _mtime_ns: int, _size: int) -> Lexicon:
    document = read_document(path, regular=True)
    if document.data is None or document.problems:
        raise ValueError("; ".join(map(str, document.problems)) or f"{path} has no words")
    try:
        return TaskWords.model_validate(document.data).lexicon
    except ValidationError as error:
        first = error.errors()[0]
        place = document.place(tuple(first["loc"]))
        raise ValueError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
