"""Sentences that explain one request, or one decision, to a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.domain.models import model_key, split_pin
from manager.domain.roles import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Shorter waits are not worth a word.
_SHORTEST_WAIT_MS = 50.0
# A sentence names so many instances; the list behind it has all of them.
_MOST_NAMED = 3
_SECOND_MS, _MINUTE_S = 1000.0, 60.0
_CANCELLED = "cancelled"
_RULED_OUT = "policy"

# What each reason says of an instance, by the one list of reasons (`errors.Reason` and the contract).
REASON_WORDS: Mapping[str, str] = {
    "instance_stopped": "{} was stopped",
    "instance_unavailable": "{} was unavailable",
    "instance_unhealthy": "{} did not answer its probes",
    "gpu_missing": "the GPU of {} was missing",
    "start_failed": "{} could not be started",
    "start_timeout": "{} did not start in time",
    "vram_insufficient": "{} had too little free GPU memory",
    "model_missing": "{} did not have the model",
    "model_load_failed": "{} could not load the model",
    "attempt_timeout": "{} did not answer in time",
    "upstream_unreachable": "{} could not be reached",
    "upstream_error": "{} failed with an error",
    "invalid_output": "{} gave an invalid answer",
    "breaker_open": "{} had failed several times and was passed over",
    "queue_full": "the queue for {} was full",
    "overloaded": "{} was overloaded",
    "host_denied": "{} does not take this model",
    "budget_exhausted": "the budget for {} was exhausted",
    "local_only": "only local instances were allowed and {} is not local",
    "policy": "the policy or a pin rules out {}",
    "engine_unavailable": "the container engine of {} did not answer",
    "image_missing": "the image of {} was missing",
    "name_conflict": "the container name of {} was taken",
    "port_taken": "the port of {} was taken",
    "container_exited": "the container of {} ended",
    "out_of_memory": "{} ran out of memory",
    "gpu_fallback": "{} had fallen back to the CPU",
    "template_outdated": "the template of {} was outdated",
    "cancelled": "the request on {} was cancelled",
}
_POLICIES = frozenset(Policy)
# A detail that begins with one of these takes the place of the words: `drained: driver update`.
_STATES = ("drained",)

_ENDINGS: Mapping[str, str] = {
    "client_error": "answered with status {status}",
    "client_gone": "the client left after {duration}",
    "refused": "refused with status {status}",
    "upstream_error": "failed with status {status}",
    "timeout": "ran out of time after {duration}",
    "cut": "cut off after {duration}",
}


def why(instance: str, reason: str, detail: str = "") -> str:
    """Return what kept an instance from answering: `gpu1 was drained (driver update)`.

    Args:
        instance: its id, or a word for what was preferred.
        reason: an entry of the one list of reasons; another one is named as it is.
        detail: words that add to it.
    """
    state, colon, rest = detail.partition(": ")
    if state in _STATES:
        words, detail = f"{instance} was {state}", rest if colon else ""
    else:
        words = REASON_WORDS.get(reason, f"{{}}: {reason}").format(instance)
    return f"{words} ({detail})" if detail else words


def request_sentence(
    record: Mapping[str, Any],
    decision: Mapping[str, Any],
    *,
    is_open: bool = False,
    waits_for: str | None = None,
) -> str:
    """Return one sentence about a request: what it asked for, where it went and why, and how it ended.

    Args:
        record: every field, as `RequestRecord.as_dict` names them.
        decision: as `history.decision_values` returns it.
        is_open: the request has not ended.
        waits_for: what an open one waits for; None where it waits for nothing.
    """
    parts = [_asked(record, decision)]
    if record.get("tier") is not None:
        parts[0] += f" {_classified(record['task_type'], record['tier'], record['task_reasoning'])}"
    gone = _gone(record, decision)
    if gone:
        parts[0] += f", {gone}"
    if not record["fallback"]:
        out = [one for one in decision["passed_over"] if one["reason"] != _RULED_OUT]
        parts.append(_named(map(passed_over_words, out)))
    parts += [*_waits(record), _shadow(record)]
    if is_open:
        took = duration_words(record["duration_ms"])
        parts.append(f"open for {took}" + (f", waits for {waits_for}" if waits_for else ""))
    else:
        parts.append(_ending(record, decision))
    return "; ".join(filter(None, parts))


def decision_sentence(decision: Mapping[str, Any], asked: str) -> str:
    """Return one sentence about where a request would go.

    Args:
        decision: with `attempts`, `passed_over`, `refused`, `role`, `runs_only`, `would_wait` and
            `passes_to_raw`, in the shape of the API, and `classification` where a choice was made.
        asked: the name that the request would give.
    """
    found = decision.get("classification")
    if found is not None:
        asked += f" {_classified(found['task_type'], found['tier'], found['reasoning'])}"
    if decision["passes_to_raw"]:
        return f"{asked} passes to rollout.raw_url; managed, {_would_go(decision, asked)}"
    return _would_go(decision, asked)


def _classified(task: str, tier: str, reasoning: str) -> str:
    return f"(task {task}, tier {tier}: {reasoning})"


def _would_go(decision: Mapping[str, Any], asked: str) -> str:
    refused, attempts = decision["refused"], decision["attempts"]
    one = asked
    if decision["runs_only"]:
        one = f"{decision['role']} takes runs only (POST /api/v1/runs); a run"
    if refused is not None or not attempts:
        return f"{one} would be refused: {refused['message'] if refused else 'no instance is left'}"
    first = attempts[0]
    would = "wait for a slot, then go" if decision.get("would_wait") else "go"
    words = f"{one} would {would} to {_place(first['instance'], first['model'], asked)}"
    if first["fallback"] is not None:
        words += f", since {_since(first['fallback'], decision['passed_over'], None)}"
    return words + _then(attempts[1:])


def passed_over_words(one: Mapping[str, Any]) -> str:
    """Return why one candidate was passed over."""
    return why(one["instance"], one["reason"], one.get("detail") or "")


def fallback_words(reason: str, preferred: str | None) -> str:
    """Return why what was preferred did not answer, without a list of candidates: `gpu0 was stopped`.

    Args:
        reason: an entry of the one list of reasons.
        preferred: an instance or a policy; None where it is not known.
    """
    return _since(reason, (), preferred)


def duration_words(milliseconds: float) -> str:
    """Return `12 ms`, `1.2 s` or `2 min 5 s`."""
    if milliseconds < _SECOND_MS:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _asked(record: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    asked = decision["asked"]
    name = asked["model"] if asked else record["model"]
    if not name:
        return f"asked {record['path']}"
    model, pin = split_pin(name)
    pin = pin or (asked and asked["instance"])
    words = f"asked for {model}" + (f" on {pin}" if pin else "")
    lane = record["lane"]
    return words + (f" in the lane {lane}" if lane and lane != model else "")


def _gone(record: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """Return where the request went, and why not elsewhere; empty where no instance answered."""
    target, attempts = record["effective_target"], decision["attempts"]
    failed = [one for one in attempts if one["outcome"] == "failed"]
    answered = [one for one in attempts if one["outcome"] != "failed"]
    if target is None:
        return ""
    asked = (decision["asked"] or record)["model"] or ""
    if not answered and failed:
        return f"found no answer: {_named(map(_failure, failed))}"
    words = f"went to {_place(target, record['model'], split_pin(asked)[0])}"
    if failed:
        return f"{words}, since {_named(map(_failure, failed))}"
    if record["fallback"] and record["fallback_reason"] is not None:
        since = _since(record["fallback_reason"], decision["passed_over"], record["fallback_from"])
        return f"{words}, since {since}"
    return words


def _shadow(record: Mapping[str, Any]) -> str:
    """Return what a decision that was only recorded would have done; empty where there was none."""
    target, refused, differs = record["shadow_target"], record["shadow_refused"], record["disagreement"]
    if target is None and refused is None:
        return ""
    words = f"managed it would go to {target}" if target else f"managed it would be refused ({refused})"
    return f"{words} - disagreement: {differs}" if differs else words


def _since(reason: str, passed_over: Iterable[Mapping[str, Any]], preferred: str | None) -> str:
    """Return why another instance was not taken: the preferred one, or all that have that reason."""
    same = [one for one in passed_over if one["reason"] == reason]
    chosen = [one for one in same if one["instance"] == preferred] or same
    if chosen:
        return _named(map(passed_over_words, chosen))
    if reason == "gpu_missing":
        return "there was no GPU"
    if preferred in _POLICIES:  # no instance was preferred
        return f"nothing preferred could answer ({reason})"
    return why(preferred or "what it asked for", reason)


def _failure(attempt: Mapping[str, Any]) -> str:
    instance, message = attempt["instance"], attempt["message"]
    if message.startswith((f"{instance} ", f"{instance}: ")):
        return str(message)
    return why(instance, attempt["reason"], message)


def _place(instance: str, model: str | None, asked: str) -> str:
    if not model or model_key(model) == model_key(asked):
        return instance
    return f"{instance} with {model}"


def _then(attempts: list[Mapping[str, Any]]) -> str:
    return f", then to {_named(str(one['instance']) for one in attempts)}" if attempts else ""


def _waits(record: Mapping[str, Any]) -> list[str]:
    found = []
    if record["start_ms"] is not None:
        found.append(f"waited {duration_words(record['start_ms'])} for a start")
    if record["queue_ms"] >= _SHORTEST_WAIT_MS:
        found.append(f"waited {duration_words(record['queue_ms'])} in the queue")
    return found


def _ending(record: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    outcome, took = record["outcome"], duration_words(record["duration_ms"])
    if outcome == "ok":
        tokens = record["output_tokens"]
        return f"answered in {took}" + (f" ({tokens} tokens)" if tokens is not None else "")
    if outcome == "cut" and record["fallback_reason"] == _CANCELLED:
        words = f"cancelled after {took}"
    else:
        words = _ENDINGS.get(outcome, outcome).format(status=record["status"], duration=took)
    refused = decision["refused"]
    message = decision["message"] or (refused["message"] if refused else "")
    is_told = any(one["message"] == message for one in decision["attempts"] if one["outcome"] == "failed")
    return words if not message or is_told or outcome == "client_gone" else f"{words}: {message}"


def _named(words: Iterable[str]) -> str:
    """Return `a, b and 3 more`, each once."""
    found = list(dict.fromkeys(words))
    rest = len(found) - _MOST_NAMED
    return ", ".join(found[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
