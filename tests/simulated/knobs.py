"""The knobs of the simulated Ollama: what a test can make it do.

Every knob is a field of :class:`Knobs`. It starts from the environment variable `OLLAMA_SIM_<NAME>` and can
be changed while the server runs by `POST /_sim/knobs` with a JSON object; `GET /_sim/knobs` shows all of
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT_PREFIX = "OLLAMA_SIM_"

_CHOICES = {
    "start_port": ("closed", "open", "never"),
    "hang": ("", "all", "body"),
    "crash": ("", "now", "start", "load", "stream"),
    "allocate_in": ("server", "child"),
    "false_load": ("", "nothing", "error"),
}


class BadKnobError(Exception):
    """The message names the knob and says what it takes."""


@dataclass(slots=True)
class Knobs:
    """Everything that a test can change. Times are seconds, sizes bytes, byte positions count body bytes.

    A byte position of -1 means never. Positions apply to streamed answers only (NDJSON and SSE).
    """

    version: str = "0.24.0"
    """What /api/version and the log say."""
    models: str = "tiny,minilm"
    """Models that are there from the start, by comma. `name=embed` makes an embedding model, a plain name a
    chat model; `minilm` is an embedding model by itself."""
    pullable: str = ""
    """Models that /api/pull finds in the registry, in the same form; any other name meets an unreachable
    one.
    """
    pull_s: float = 0.0
    """How long a pull takes."""

    load_s: float = 0.0
    """How long a model takes to load."""
    false_load: str = ""
    """What a request to load gets with 200 although nothing is loaded: the usual answer (`nothing`) or an
    error (`error`)."""
    unload_s: float = 0.0
    """How long a model is still listed after it expired."""
    vram_bytes: int = 0
    """Memory of a model on a GPU, as /api/ps reports it; 0 means the model's own size."""
    tokens: int = 32
    """Length of an answer, unless the request asks for less."""
    tokens_per_s: float = 0.0
    """Speed of an answer; 0 means no pauses."""
    burn_cpu: bool = False
    """Keep one core busy while a request is being answered, as a model on a CPU would."""

    start_delay_s: float = 0.0
    """How long the server needs before it answers."""
    start_port: str = "closed"
    """The port during the start delay: `closed`, `open` (bound, silent until the delay is over, as the real
    one is while it looks for GPUs), or `never` (not bound at all, delay or no delay)."""
    cpu_fallback: bool = False
    """Behave as if no GPU was found, whatever the environment says."""

    hang: str = ""
    """`all`: accept requests and never answer. `body`: send a 200 and its headers, then nothing."""
    stall_at_byte: int = -1
    """Stop sending after this many bytes of a stream; the connection stays open."""
    error_at_byte: int = -1
    """End a stream with an error before the first line that would pass this position."""
    error_text: str = "an error was encountered while running the model: unexpected EOF"
    """What that error says."""
    queue_full: bool = False
    """Refuse inference with 503, as a full queue does."""

    crash: str = ""
    """When the process exits with `crash_exit`: `now` (at once, by POST), `start` (before the port is bound),
    `load` (half-way through loading a model) or `stream` (at `crash_at_byte`)."""
    crash_exit: int = 2
    """Exit code of that crash."""
    crash_at_byte: int = 0
    """Where in a stream `crash=stream` happens."""

    shutdown_s: float = 0.0
    """How long SIGTERM takes to end the server; negative: SIGTERM is ignored."""
    allocate_bytes: int = 0
    """Real memory to hold. Lowering it frees what was held before."""
    allocate_in: str = "server"
    """Who holds it: the `server` itself or a `child` process."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Knobs:
        """Read every `OLLAMA_SIM_*` variable. Raises BadKnobError for an unknown one or a bad value."""
        knobs = cls()
        knobs.update(
            {
                name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
                for name, value in environment.items()
                if name.startswith(ENVIRONMENT_PREFIX)
            }
        )
        return knobs

    def update(self, changes: object) -> None:
        """Apply all of `changes` or, raising BadKnobError, none. Text is read as in the environment."""
        if not isinstance(changes, dict):
            raise BadKnobError("knobs are the members of a JSON object")
        known = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        checked: dict[str, object] = {}
        for name, value in changes.items():
            if name not in known:
                raise BadKnobError(f"unknown knob {name!r}; known: {', '.join(known)}")
            checked[name] = _converted(name, value, known[name])
        for name, value in checked.items():
            setattr(self, name, value)

    def as_dict(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _converted(name: str, value: object, wanted: type) -> object:
    result: object = None
    if wanted is str and isinstance(value, str):
        result = value
    elif wanted is bool:
        words = {"1": True, "true": True, "0": False, "false": False}
        result = value if isinstance(value, bool) else words.get(str(value).lower())
    elif wanted in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            result = wanted(value)
        except ValueError:
            result = None
    if result is None:
        raise BadKnobError(f"knob {name!r} takes {wanted.__name__}, not {value!r}")
    if name in _CHOICES and result not in _CHOICES[name]:
        raise BadKnobError(
            f"knob {name!r} takes one of {', '.join(map(repr, _CHOICES[name]))}, not {value!r}"
        )
    return result
