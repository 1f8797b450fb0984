"""The kind of task that a request is about, and the tier of models that it needs: rules over its words."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from manager.domain.learned import LearnedModel, Told

CHAT = "chat"
# Characters: a shorter request is small talk, a longer one needs thought, where no word says otherwise.
SHORT_BELOW = 50
LONG_ABOVE = 500
# Of a longer text, so much of its beginning and as much of its end is read.
READ_EACH_END = 8192
# A stem is told from a whole word by its end.
STEM = "*"
LEAST_STEM = 3

_FORCED, _BY_WORDS, _LONG, _SHORT, _NOTHING = 1.0, 0.8, 0.6, 0.5, 0.4
_WORD = re.compile(r"[^\W_]+")
# The time to compose accents grows with the square of a text that is nothing else: they are composed in
# parts, which end between two words where they can.
_PART = re.compile(r".{1,256}(?!\S)|.{1,256}", re.DOTALL)
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
_WORD_OF_ENTRY = re.compile(r"[^\W_]+\*?")


class Tier(StrEnum):
    """The capability of models, in three steps; each is a role of that name."""

    FAST = "fast"
    MEDIUM = "medium"
    COMPLEX = "complex"


_TIERS = tuple(Tier)


class Classification(NamedTuple):
    """The task and the tier of a request. `confidence` is from 0 to 1; `reasoning` says it in words.

    `is_moved` is whether the tier is another one than is usual for the task.
    """

    task_type: str
    tier: Tier
    confidence: float
    reasoning: str
    is_moved: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of task, the tier it usually needs, and the words that tell of it."""

    name: str
    tier: Tier
    words: tuple[str, ...]


class _Entry(NamedTuple):
    """One word or phrase. `rest` are the words of a phrase behind its first one."""

    group: int
    text: str
    stem: str
    rest: tuple[str, ...]


_MORE, _LESS = -1, -2


@dataclass(frozen=True)
class Lexicon:
    """The words that tell kinds of tasks apart, and those that ask for more or less thought.

    An entry is one word, several words in a row, or a stem such as `summar*` for every word that begins so.
    Case does not count, and neither does what stands between words.

    Raises:
        ValueError: an entry has no word, or a stem is shorter than LEAST_STEM.
    """

    tasks: tuple[Task, ...]
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self._entries

    @cached_property
    def _entries(self) -> tuple[Mapping[str, tuple[_Entry, ...]], Mapping[str, tuple[_Entry, ...]]]:
        """The entries by their first word, and those that begin with a stem by its first characters."""
        whole: dict[str, list[_Entry]] = {}
        stems: dict[str, list[_Entry]] = {}
        groups = [(index, task.words) for index, task in enumerate(self.tasks)]
        for group, texts in (*groups, (_MORE, self.more), (_LESS, self.less)):
            for text in texts:
                first, *rest = _words_of_entry(text)
                entry = _Entry(group, text, first.removesuffix(STEM), tuple(rest))
                if first.endswith(STEM):
                    stems.setdefault(first[:LEAST_STEM], []).append(entry)
                else:
                    whole.setdefault(first, []).append(entry)
        return _frozen(whole), _frozen(stems)

    def found(self, words: list[str]) -> Iterator[tuple[_Entry, int]]:
        """Yield the entries that stand in a text, and where each stands first."""
        whole, stems = self._entries
        places: dict[str, list[int]] = {}
        for at, word in enumerate(words):
            places.setdefault(word, []).append(at)
        for word, here in places.items():
            entries = whole.get(word, ())
            with_stems = stems.get(word[:LEAST_STEM])
            if with_stems is not None:
                entries += tuple([entry for entry in with_stems if word.startswith(entry.stem)])
            for entry in entries:
                first = _first_place(words, here, entry.rest, places)
                if first is not None:
                    yield entry, first


@dataclass(frozen=True)
class AutoRules:
    """The rules that choose the model of a request which leaves the choice to the daemon.

    `is_on` is whether a name of a model may say so; the daemon's own API may in any case. `learned` tells the
    task where it is there.
    """

    lexicon: Lexicon
    escalate_below: float = 0.0
    is_on: bool = True
    learned: LearnedModel | None = None


def classify(
    text: str,
    lexicon: Lexicon,
    *,
    forced: Tier | None = None,
    escalate_below: float = 0.0,
    told: Told | None = None,
) -> Classification:
    """Return what a request is about. The same text has the same result.

    Where a learned classifier has `told` the task, words of tasks do not count.

    Of several tasks the one with the most different words wins, then the one that is named first. Words that
    ask for more or less thought move the tier by one, and cancel each other. A classification that is less
    sure than `escalate_below` moves one tier up. Nothing moves a tier that is `forced`.
    """
    words, length = _words(text), len(text.strip())
    hits: dict[int, dict[str, int]] = {}
    for entry, at in lexicon.found(words):
        places = hits.setdefault(entry.group, {})
        places[entry.text] = min(at, places.get(entry.text, at))
    more, less = hits.pop(_MORE, {}), hits.pop(_LESS, {})
    found = _by_model(told, lexicon) if told is not None else _by_words(hits, lexicon) or _by_length(length)
    if forced is not None:
        moved = forced is not found.tier
        return found._replace(tier=forced, confidence=_FORCED, reasoning="the tier was named", is_moved=moved)
    move, why = _move(more, less)
    if move == 0 and found.confidence < escalate_below:
        move, why = 1, f"less sure than {escalate_below:g}"
    tier = _moved(found.tier, move)
    if tier is found.tier:
        return found
    reasoning = f"{found.reasoning}; {why} moves it to {tier}"
    return found._replace(tier=tier, reasoning=reasoning, is_moved=True)


# --- helpers, in call order ---


def _frozen(entries: Mapping[str, list[_Entry]]) -> Mapping[str, tuple[_Entry, ...]]:
    return {first: tuple(found) for first, found in entries.items()}


def _words_of_entry(text: str) -> list[str]:
    words = _WORD_OF_ENTRY.findall(_folded(text))
    if not words:
        raise ValueError(f"{text!r} has no word")
    for word in words:
        if word.endswith(STEM) and len(word) <= LEAST_STEM:
            raise ValueError(f"{text!r}: expected at least {LEAST_STEM} characters before {STEM}")
    return words


def _folded(text: str) -> str:
    if not text.isascii():
        text = "".join([unicodedata.normalize("NFC", part) for part in _PART.findall(text)])
    return text.casefold().translate(_UMLAUTS)


def _words(text: str) -> list[str]:
    if len(text) <= 2 * READ_EACH_END:
        return _WORD.findall(_folded(text))
    first, last = _folded(text[:READ_EACH_END]), _folded(text[-READ_EACH_END:])
    # Words that are cut through do not count.
    begins, ends = _WORD.findall(first), _WORD.findall(last)
    if first[-1].isalnum():
        begins.pop()
    return begins + ends[last[0].isalnum() :]


def _first_place(
    words: list[str], here: list[int], rest: tuple[str, ...], places: Mapping[str, list[int]]
) -> int | None:
    """Return where an entry stands first whose first word stands `here`; None where it stands nowhere.

    The rarer one of its first two words is looked at: some phrases begin with a word of every sentence.
    """
    if rest and not rest[0].endswith(STEM):
        behind = places.get(rest[0], ())
        if len(behind) < len(here):
            first = words[here[0]]
            here = [at - 1 for at in behind if at > 0 and words[at - 1] == first]
    return next((at for at in here if _follows(words, at, rest)), None)


def _follows(words: list[str], at: int, rest: tuple[str, ...]) -> bool:
    """Return whether the words of a phrase stand behind its first one."""
    behind = words[at + 1 : at + 1 + len(rest)]
    return len(behind) == len(rest) and all(map(_is_word, behind, rest))


def _is_word(word: str, wanted: str) -> bool:
    return word.startswith(wanted[:-1]) if wanted.endswith(STEM) else word == wanted


def _by_words(hits: Mapping[int, Mapping[str, int]], lexicon: Lexicon) -> Classification | None:
    if not hits:
        return None
    best = min(hits, key=lambda group: (-len(hits[group]), min(hits[group].values()), group))
    task = lexicon.tasks[best]
    return Classification(task.name, task.tier, _BY_WORDS, f"it has {_quoted(hits[best])}")


def _by_model(told: Told, lexicon: Lexicon) -> Classification:
    """Return the task that was told; one that has no words is chat, of a middle tier."""
    tier = next((task.tier for task in lexicon.tasks if task.name == told.task), Tier.MEDIUM)
    return Classification(told.task, tier, round(told.confidence, 3), "the learned classifier says so")


def _by_length(length: int) -> Classification:
    if length < SHORT_BELOW:
        return Classification(CHAT, Tier.FAST, _SHORT, f"it is short ({length} characters)")
    if length > LONG_ABOVE:
        return Classification(CHAT, Tier.COMPLEX, _LONG, f"it is long ({length} characters)")
    return Classification(CHAT, Tier.MEDIUM, _NOTHING, "nothing in it tells the task")


def _move(more: Mapping[str, int], less: Mapping[str, int]) -> tuple[int, str]:
    if bool(more) is bool(less):
        return 0, ""
    return (1, _quoted(more)) if more else (-1, _quoted(less))


def _moved(tier: Tier, move: int) -> Tier:
    return _TIERS[max(0, min(len(_TIERS) - 1, _TIERS.index(tier) + move))]


def _quoted(entries: Iterable[str]) -> str:
    """Name the first three."""
    some = list(entries)[:3]
    return ", ".join(f"'{one}'" for one in some)
