"""The file of a learned classifier, as `ollama-manager classifier train` writes it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manager.domain.learned import MOST_DIMENSIONS, MOST_TASKS, LearnedModel

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES = 64 * 2**20
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Row = Annotated[tuple[_Number, ...], Field(min_length=1, max_length=MOST_DIMENSIONS)]


class LearnedFile(BaseModel):
    """Weights have one row a task, all of one length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding_model: Annotated[str, Field(min_length=1, max_length=512)]
    tasks: Annotated[tuple[str, ...], Field(min_length=2, max_length=MOST_TASKS)]
    weights: Annotated[tuple[_Row, ...], Field(min_length=2, max_length=MOST_TASKS)]
    bias: Annotated[tuple[_Number, ...], Field(min_length=2, max_length=MOST_TASKS)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    rules_accuracy: Annotated[float, Field(ge=0, le=1)]
    rows: Annotated[int, Field(ge=1)]


def read_learned(path: Path) -> LearnedModel:
    """Read the file of a classifier.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or it is no better than the rules; the message says what.
    """
    status = path.stat()
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{path} has {status.st_size} bytes; expected at most {MOST_BYTES}")
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _mtime_ns: int, _size: int) -> LearnedModel:
    try:
        found = LearnedFile.model_validate(orjson.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    dimensions = set(map(len, found.weights))
    if not len(found.tasks) == len(found.weights) == len(found.bias) or len(dimensions) != 1:
        raise ValueError(f"{path}: tasks, weights and bias do not fit each other")
    if found.accuracy <= found.rules_accuracy:
        told = (
            f"{found.accuracy:.0%} on held-out requests, and the rules over words {found.rules_accuracy:.0%}"
        )
        raise ValueError(f"{path}: the classifier has {told}; expected one that is better")
    return LearnedModel(
        found.embedding_model, found.tasks, found.weights, found.bias, found.accuracy, found.rules_accuracy
    )
