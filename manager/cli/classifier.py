"""`classifier train`: learn to tell tasks from labelled requests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from manager.cli.collections import daemon_at
from manager.cli.commands import _JSON, _talks
from manager.cli.failures import DONE, MISUSED, REFUSED, CommandError
from manager.cli.printing import print_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from manager.cli.client import Daemon
    from manager.domain.classification import Lexicon

_BATCH = 32
_LEAST_ROWS = 40
_LEAST_OF_TASK = 5
_MOST_ROWS = 100_000
# Of each task every fifth row is held out.
_HELD_OUT = 5
# The inverse strength of L2 regularisation: vectors have length 1, so that the usual 1.0 learns little.
_INVERSE_STRENGTH = 10.0
_DIGITS = 6
_HOW = "`pip install 'ollama-endpoint-manager[classifier]'` brings it"


class Labelled(NamedTuple):
    """One request and its task."""

    task: str
    text: str


@click.group("classifier")
def classifier_group() -> None:
    """The learned classifier of requests for `model: auto`."""


@classifier_group.command("train")
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="ROWS")
@click.option("--model", default="embedding", show_default=True, help="An embedding model, or a role.")
@click.option(
    "--words", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The file `routing.words`."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("classifier.json"),
    show_default=True,
)
@_JSON
@_talks
def train(
    rows: Path,
    model: str,
    words: Path | None,
    out: Path,
    *,
    url: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Learn from ROWS, a file with a task, a tab and a request in each line.

    A fifth of the rows is held out, to compare with the rules over words. Exit 4 where they are better: then
    nothing is written.
    """
    lexicon = _lexicon(words)
    labelled = _read(rows, lexicon)
    daemon = daemon_at(url, config)
    vectors = list(_vectors([one.text for one in labelled], model, daemon))
    document = _learned(labelled, vectors, lexicon, model)
    is_better = document["accuracy"] > document["rules_accuracy"]
    if is_better:
        _save(document, out)
    figures = {key: document[key] for key in ("accuracy", "rules_accuracy", "rows", "held_out")}
    if as_json:
        print_json({**figures, "file": str(out) if is_better else None})
    else:
        click.echo(f"{figures['rows']} rows, {figures['held_out']} of them held out")
        click.echo(f"learned classifier: {figures['accuracy']:.0%} of those")
        click.echo(f"rules over words:   {figures['rules_accuracy']:.0%}")
        if is_better:
            click.echo(f"written to {out}; set routing.learned to it, and send the daemon SIGHUP")
        else:
            click.echo("the rules are as good or better: nothing was written")
    return DONE if is_better else REFUSED


# --- helpers, in call order ---


def _lexicon(words: Path | None) -> Lexicon:
    from manager.settings.auto import SHIPPED, read_words  # noqa: PLC0415

    try:
        return read_words(words or SHIPPED)
    except ValueError as error:
        raise CommandError(str(error), exit_code=MISUSED) from None


def _read(path: Path, lexicon: Lexicon) -> list[Labelled]:
    """Return the rows of a file, each request once."""
    from manager.domain.classification import CHAT  # noqa: PLC0415

    known = {CHAT, *(task.name for task in lexicon.tasks)}
    found: dict[str, Labelled] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        task, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise CommandError(f"{path}:{number}: expected a task, a tab and a request", exit_code=MISUSED)
        if task not in known:
            allowed = ", ".join(sorted(known))
            raise CommandError(f"{path}:{number}: {task!r} is no task; expected {allowed}", exit_code=MISUSED)
        found.setdefault(text, Labelled(task, text))
    counts = Counter(one.task for one in found.values())
    if not _LEAST_ROWS <= len(found) <= _MOST_ROWS or len(counts) < 2:  # noqa: PLR2004
        given = f"{len(found)} requests of {len(counts)} tasks"
        wanted = f"{_LEAST_ROWS} to {_MOST_ROWS} requests of two tasks at least"
        raise CommandError(f"{path} has {given}; expected {wanted}", exit_code=MISUSED)
    for task, count in counts.items():
        if count < _LEAST_OF_TASK:
            message = f"{path} has {count} requests of the task {task}; expected {_LEAST_OF_TASK} or more"
            raise CommandError(message, exit_code=MISUSED)
    # An order that depends on the texts alone: the same rows are held out each time.
    return sorted(found.values(), key=lambda one: hashlib.sha256(one.text.encode()).digest())


def _vectors(texts: Sequence[str], model: str, daemon: Daemon) -> Iterator[list[float]]:
    from manager.services.routing.learned import MOST_CHARACTERS, PATH  # noqa: PLC0415

    for start in range(0, len(texts), _BATCH):
        batch = [text[:MOST_CHARACTERS] for text in texts[start : start + _BATCH]]
        body = {"model": model, "input": batch, "truncate": True}
        made = daemon.ask("POST", PATH, body, is_long=True).get("embeddings")
        if not isinstance(made, list) or len(made) != len(batch):
            raise CommandError(f"{model} made no vector of each request", exit_code=REFUSED)
        yield from made


def _learned(
    labelled: Sequence[Labelled], vectors: Sequence[Sequence[float]], lexicon: Lexicon, model: str
) -> dict[str, Any]:
    """Train with four fifths of the rows; return the file, with what the others say of it."""
    try:
        import numpy as np  # noqa: PLC0415
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    except ImportError:
        raise CommandError(f"scikit-learn is not installed; {_HOW}", exit_code=MISUSED) from None
    from manager.domain.classification import classify  # noqa: PLC0415

    matrix = np.asarray(vectors, dtype="float64")
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if matrix.ndim != 2 or not np.isfinite(matrix).all() or not lengths.all():  # noqa: PLR2004
        raise CommandError(f"{model} made vectors that cannot be used", exit_code=REFUSED)
    matrix /= lengths
    held = _held_out(labelled)
    tasks = np.array([one.task for one in labelled])
    fitted = LogisticRegression(C=_INVERSE_STRENGTH, max_iter=2000).fit(matrix[~held], tasks[~held])
    by_rules = [classify(one.text, lexicon).task_type == one.task for one in labelled]
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:  # of two tasks scikit-learn keeps the difference alone
        weights, bias = np.vstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return {
        "embedding_model": model,
        "tasks": list(map(str, fitted.classes_)),
        "weights": np.round(weights, _DIGITS).tolist(),
        "bias": np.round(bias, _DIGITS).tolist(),
        "accuracy": float(fitted.score(matrix[held], tasks[held])),
        "rules_accuracy": float(np.mean(np.array(by_rules)[held])),
        "rows": len(labelled),
        "held_out": int(held.sum()),
    }


def _held_out(labelled: Sequence[Labelled]) -> Any:
    import numpy as np  # noqa: PLC0415

    seen: Counter[str] = Counter()
    held = []
    for one in labelled:
        seen[one.task] += 1
        held.append(seen[one.task] % _HELD_OUT == 0)
    return np.array(held)


def _save(document: dict[str, Any], path: Path) -> None:
    """Write a file whole, or not at all."""
    kept = {key: value for key, value in document.items() if key != "held_out"}
    with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as file:
        try:
            json.dump(kept, file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
