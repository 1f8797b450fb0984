"""`models`: which model is where, and which roles use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import warn
from manager.cli.printing import UNKNOWN, print_json, print_rows
from manager.cli.tables import size
from manager.domain.models import model_key
from manager.domain.wording import SHORT_DIGEST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LISTED, _STORED, _LOADED, _ROLES = "/v1/models", "/api/tags", "/api/ps", "/api/settings/models"
_HEADING = ("MODEL", "SIZE", "PARAMETERS", "ON", "STATUS", "LOADED ON", "ROLES")
_OWNER_OF_ROLES = "ollama-manager"
PULL_AGAIN = "`ollama pull NAME@INSTANCE` gets an instance the model that the registry has now"

_Row = tuple[object, ...]


@click.command("models")
@_JSON
@_talks
def models_command(*, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show all models: where they are, where they are loaded, and which roles use them. Starts nothing.

    With --json the answers of the API, by path.
    """
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    answers = {path: daemon.ask("GET", path) for path in (_LISTED, _STORED, _LOADED, _ROLES)}
    if as_json:
        print_json(answers)
        return
    rows = daemon.read(_rows, answers)
    if rows:
        print_rows(_HEADING, rows)
    else:
        click.echo("no instance is known to have a model", err=True)
    if differing := daemon.read(differing_models, answers[_LISTED]):
        warn(f"not the same on all instances: {', '.join(differing)}; {PULL_AGAIN}")


def differing_models(listed: Mapping[str, Any]) -> dict[str, Mapping[str, Sequence[str]]]:
    """Return the digests of the models in an answer of `/v1/models` that have more than one."""
    return {
        model["id"]: model["digests"]
        for model in listed["data"]
        if model["owned_by"] != _OWNER_OF_ROLES and len(model["digests"]) > 1
    }


def _rows(answers: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    """A row for each model, then one for each model that only roles name."""
    stored = {model_key(entry["name"]): entry for entry in answers[_STORED]["models"]}
    loaded: dict[str, list[str]] = {}
    for entry in answers[_LOADED]["models"]:
        loaded.setdefault(model_key(entry["name"]), []).append(_in_memory(entry))
    users: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for role, values in answers[_ROLES]["roles"].items():
        if values["model"] is not None:
            key = model_key(values["model"])
            users.setdefault(key, []).append(role)
            names.setdefault(key, values["model"])
    rows: list[_Row] = []
    for model in answers[_LISTED]["data"]:
        if model["owned_by"] == _OWNER_OF_ROLES:
            continue
        key = model_key(model["id"])
        entry = stored.get(key, {})
        rows.append(
            (
                model["id"],
                size(entry["size"]) if entry.get("size") else UNKNOWN,
                (entry.get("details") or {}).get("parameter_size") or UNKNOWN,
                ", ".join(_place(id_, model["digests"]) for id_ in model["instances"]),
                model["status"],
                ", ".join(loaded.get(key, ())),
                ", ".join(users.pop(key, ())),
            )
        )
    missing = (
        (names[key], None, None, "nowhere", None, None, ", ".join(roles)) for key, roles in users.items()
    )
    return [*rows, *missing]


def _place(instance_id: str, digests: Mapping[str, Sequence[str]]) -> str:
    """The id of an instance, with the model's digest there where instances have different ones."""
    if len(digests) > 1:
        for digest, ids in digests.items():
            if instance_id in ids:
                return f"{instance_id} ({digest[:SHORT_DIGEST]})"
    return instance_id


def _in_memory(entry: Mapping[str, Any]) -> str:
    """`gpu0 5.2G`, with the share on the card where it is a part: `gpu0 5.2G (40 % on the card)`."""
    total, on_card = entry.get("size") or 0, entry.get("size_vram") or 0
    share = f" ({100 * on_card // total} % on the card)" if 0 < on_card < total else ""
    return f"{entry['instance']} {size(total)}{share}"
