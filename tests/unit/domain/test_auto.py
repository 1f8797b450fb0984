"""The choice of a role for a request that names no model."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.auto import NAMES, Choice, choose, choose_for, is_auto, offered, offered_name
from manager.domain.classification import AutoRules, Lexicon, Task, Tier
from manager.domain.facts import ModelFacts, models_by_tier
from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.overload import Overloads
from manager.domain.roles import BodyChanges, Parameters, RequestKind, Role, RoutingSettings
from manager.domain.routing import Candidate, RequestFacts, Snapshot, State, decide
from manager.errors import Reason

RULES = AutoRules(
    Lexicon(
        (Task("summary", Tier.MEDIUM, ("summary",)), Task("strategy", Tier.COMPLEX, ("strategy",))), ("why",)
    )
)
GENERATE = RequestKind.GENERATE
Facts = dict[str, ModelFacts]


def settings(*roles: Role, auto: AutoRules | None = RULES, facts: Facts | None = None) -> RoutingSettings:
    return RoutingSettings({role.name: role for role in roles}, auto=auto, facts=facts or {})


def role(name: str, model: str | None = "m", **values: Any) -> Role:
    return Role(name, values.pop("kind", GENERATE), model, **values)


TIERS = settings(role("fast"), role("medium"), role("complex"))


@pytest.mark.parametrize(
    "model", ["auto", "AUTO", " auto ", "auto:latest", "auto:fast", "Auto:Complex", "auto@gpu0"]
)
def test_names_that_leave_the_choice_open(model: str) -> None:
    assert is_auto(model.strip(), GENERATE, TIERS)
    assert not is_auto(model.strip(), RequestKind.EMBED, TIERS)
    assert not is_auto(model.strip(), GENERATE, settings(auto=None))


@pytest.mark.parametrize("model", ["", "au", "automatic", "auto:7b", "auto:", "automedium", "llama3"])
def test_other_names_are_models(model: str) -> None:
    assert not is_auto(model, GENERATE, TIERS)


@pytest.mark.parametrize(
    ("model", "text", "name"),
    [
        ("auto", "hi", "fast"),
        ("auto:latest", "hi", "fast"),
        ("auto", "a summary", "medium"),
        ("auto", "a strategy", "complex"),
        ("auto", "a summary, and why", "complex"),
        ("auto:fast", "a strategy", "fast"),
        ("auto:complex", "hi", "complex"),
        ("AUTO:medium@gpu0", "hi", "medium@gpu0"),
    ],
)
def test_the_tier_is_the_role(model: str, text: str, name: str) -> None:
    choice = choose(model, text, TIERS, RULES)
    assert (choice.role, choice.model, choice.message) == (name.partition("@")[0], name, "")


def test_a_task_with_a_role_of_its_own_goes_there_unless_another_tier_is_asked_for() -> None:
    own = settings(role("fast"), role("medium"), role("complex"), role("summary"))

    def chosen(model: str, text: str) -> str | None:
        return choose(model, text, own, RULES).role

    assert chosen("auto", "a summary") == "summary"
    assert chosen("auto", "a summary, and why") == "complex"
    assert chosen("auto:medium", "a summary") == "medium"
    without = settings(role("medium"), role("summary", None), role("strategy", kind=RequestKind.EMBED))
    assert choose("auto", "a summary", without, RULES).role == "medium"
    assert choose("auto", "a strategy", without, RULES).role is None


def test_a_tier_without_a_model_says_what_to_set() -> None:
    choice = choose("auto", "a strategy", settings(role("complex", None), role("fast")), RULES)
    assert isinstance(choice, Choice)
    assert choice.role is None
    assert choice.message == (
        "this request needs the tier 'complex' (it has 'strategy'), and no role of that name has "
        "a model; set roles.complex.model"
    )


def test_a_tier_has_the_models_of_its_facts_or_of_its_fallbacks() -> None:
    facts = {"s": ModelFacts("s", Tier.FAST)}
    assert choose("auto", "hi", settings(role("fast", None), facts=facts), RULES).role == "fast"
    chain = settings(role("fast", None, fallbacks=("medium",)), role("medium"))
    assert choose("auto", "hi", chain, RULES).role == "fast"


def test_the_fastest_model_of_a_tier_goes_first() -> None:
    facts = [
        ModelFacts("unknown", Tier.FAST),
        ModelFacts("slow", Tier.FAST, latency_ms=900),
        ModelFacts("quick", Tier.FAST, latency_ms=100),
        ModelFacts("other", Tier.COMPLEX),
        ModelFacts("none"),
    ]
    assert models_by_tier(facts) == {"fast": ("quick", "slow", "unknown"), "complex": ("other",)}
    found = settings(role("fast", "Slow"), facts={one.name: one for one in facts})
    assert found.models_of(found.roles["fast"]) == ("Slow", "quick", "unknown")
    assert found.models_of(role("fast", None)) == ("quick", "slow", "unknown")
    assert found.models_of(role("mine", "m")) == ("m",)
    assert found.models_of(role("mine", None)) == ()


def test_names_are_offered_with_the_roles_that_may_answer_them_the_usual_tier_first() -> None:
    found = {name: [one.name for one in roles] for name, roles in offered(TIERS).items()}
    assert found == {
        "auto": ["medium", "fast", "complex"],
        "auto:fast": ["fast"],
        "auto:medium": ["medium"],
        "auto:complex": ["complex"],
    }
    assert tuple(found) == NAMES


def test_a_tier_that_cannot_answer_is_not_offered_and_without_any_no_name_is() -> None:
    some = settings(role("fast"), role("medium", None), role("complex", kind=RequestKind.EMBED))
    assert list(offered(some)) == ["auto", "auto:fast"]
    assert offered(settings(role("summary"))) == {}
    assert offered(settings(role("fast"), auto=None)) == {}
    assert offered(settings(role("fast"), auto=AutoRules(RULES.lexicon, is_on=False))) == {}


@pytest.mark.parametrize(
    ("model", "name"),
    [("AUTO", "auto"), ("auto:latest", "auto"), ("Auto:Fast@gpu0", "auto:fast"), ("auto:fast", "auto:fast")],
)
def test_an_offered_name_is_found_however_it_is_written(model: str, name: str) -> None:
    assert offered_name(model) == name


# --- the models of a tier, in a decision ---


def place(name: str, *models: str, slow: str = "") -> Candidate:
    overloads = Overloads("", {slow: "slow of late"}) if slow else None
    having = {model_key(one): one for one in models}
    return Candidate(name, DeviceKind.CPU, State.READY, models=having, overloads=overloads)


def tried(found: RoutingSettings, *candidates: Candidate) -> list[tuple[str, str, Reason | None]]:
    decision = decide(RequestFacts("fast", GENERATE), found, Snapshot(candidates))
    return [(one.instance, one.model, one.fallback) for one in decision.in_order(dict.fromkeys("ab", 0))]


FACTS = {one.name: one for one in (ModelFacts("q", Tier.FAST, latency_ms=1), ModelFacts("r", Tier.FAST))}
TIER = settings(role("fast", None, fallbacks=("medium",)), role("medium", "m"), facts=FACTS)


def test_a_tier_goes_through_its_models_then_along_its_fallbacks() -> None:
    later = Reason.INSTANCE_UNAVAILABLE
    assert tried(TIER, place("a", "q", "r", "m")) == [("a", "q", None), ("a", "r", later), ("a", "m", later)]
    missing = Reason.MODEL_MISSING
    assert tried(TIER, place("a", "r", "m")) == [("a", "r", missing), ("a", "m", missing)]


def test_a_model_that_is_slow_wherever_it_runs_gives_way_to_the_next_one_of_its_tier() -> None:
    why = Reason.OVERLOADED
    slow = model_key("q")
    assert tried(TIER, place("a", "q", "r", "m", slow=slow)) == [
        ("a", "r", why),
        ("a", "q", why),
        ("a", "m", why),
    ]
    # On another instance it is as usual.
    found = tried(TIER, place("a", "q", slow=slow), place("b", "q", "r"))
    assert [(instance, model) for instance, model, _ in found] == [("b", "q"), ("a", "q"), ("b", "r")]
    both = Candidate(
        "a",
        DeviceKind.CPU,
        State.READY,
        models={model_key(one): one for one in "qr"},
        overloads=Overloads("", {model_key(one): "slow of late" for one in "qr"}),
    )
    assert [one[1] for one in tried(TIER, both)] == ["q", "r"]


def test_what_is_expected_of_a_model_is_known_by_its_key() -> None:
    found = settings(facts={model_key("q"): FACTS["q"]})
    assert (found.expected_ms(model_key("q")), found.expected_ms(model_key("r"))) == (1, None)


def test_facts_are_defaults_of_requests_for_the_model() -> None:
    facts = {model_key("q"): ModelFacts("q", temperature=0.5, context_tokens=10, output_tokens=20)}
    assert settings(facts=facts).changes_for("q", None) == BodyChanges(parameters=Parameters(0.5, 10, 20))
    assert settings(facts=facts).changes_for("other", None).empty
    assert BodyChanges(parameters=Parameters(0.5)).size > 0
    assert BodyChanges().size == 0


@pytest.mark.parametrize(
    ("task", "roles", "name"),
    [
        ("summary", (role("summary"), role("medium")), "summary"),
        ("summary", (role("medium"),), "medium"),
        ("unknown", (role("fast"),), "fast"),
        ("summary", (role("fast"),), None),
    ],
)
def test_a_named_task_has_its_role_or_that_of_its_tier(
    task: str, roles: tuple[Role, ...], name: str | None
) -> None:
    choice = choose_for(task, settings(*roles), RULES)
    assert choice.role == name
    assert (choice.classification.task_type, choice.classification.confidence) == (task, 1.0)
