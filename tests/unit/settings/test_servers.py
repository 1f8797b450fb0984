"""Servers that somebody else runs, and paid ones: what may be written, and what is made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.instance import Driver, KeySource
from manager.domain.money import Price
from manager.domain.roles import RequestKind
from manager.domain.target import Protocol
from manager.errors import ConfigurationError
from manager.settings import load_settings, load_templates, resolve_instances
from manager.settings.servers import base_url, to_fallback

if TYPE_CHECKING:
    from pathlib import Path

ENVIRON = {"HOME": "/home/someone"}
PRICES = "input_usd_per_mtok: 0.25, output_usd_per_mtok: 2"
MODELS = f"models: {{gpt: {{{PRICES}, for: [thinking]}}}}"
CLOUD = f"driver: cloud, protocol: openai, url: 'https://x/v1', key_env: KEY, {MODELS}"
EXTERNAL = "driver: external, url: 'http://nas:8000'"


def read(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ=ENVIRON)


def specs(tmp_path: Path, *instances: str, more: str = "") -> Any:
    named = ", ".join(instances)
    loaded = read(tmp_path, f"gpus: none\ninstances: {{{named}}}\n{more}")
    return {one.id: one for one in resolve_instances(loaded, load_templates(loaded.settings))}


def test_a_paid_server_as_it_is_used(tmp_path: Path) -> None:
    found = specs(tmp_path, f"openai: {{{CLOUD}}}")["openai"]
    assert (found.driver, found.protocol, found.url) == (Driver.CLOUD, Protocol.OPENAI, "https://x/v1")
    assert found.is_paid
    assert found.key == KeySource(env="KEY")
    assert found.prices == {"gpt": Price(250_000, 2_000_000)}
    assert [(one.model, "thinking" in one.stands_in) for one in found.offers] == [("gpt", True)]
    assert found.serves == {RequestKind.GENERATE, RequestKind.EMBED}
    claude = specs(tmp_path, f"c: {{{CLOUD.replace('openai', 'anthropic')}}}")["c"]
    assert claude.serves == {RequestKind.GENERATE}


def test_a_price_is_never_rounded_to_less(tmp_path: Path) -> None:
    text = CLOUD.replace("0.25", "0.00000001").replace("for:", "max_output_tokens: 7, for:")
    assert specs(tmp_path, f"openai: {{{text}}}")["openai"].prices == {"gpt": Price(1, 2_000_000, 7)}


def test_an_external_server_with_and_without_a_list_of_models(tmp_path: Path) -> None:
    found = specs(
        tmp_path,
        f"a: {{{EXTERNAL}, protocol: openai, key_file: key.txt, models: [w]}}",
        f"b: {{{EXTERNAL}}}",
        f"c: {{{EXTERNAL}, protocol: openai}}",
    )
    assert found["a"].model_names == ("w",)
    assert found["a"].key == KeySource(file=tmp_path / "key.txt"), "relative to the configuration"
    assert str(found["a"].key) == str(tmp_path / "key.txt")
    assert (found["a"].url, found["b"].url) == ("http://nas:8000/v1", "http://nas:8000")
    assert (found["b"].protocol, found["b"].key, found["c"].model_names) == (Protocol.OLLAMA, None, None)
    assert not found["a"].is_paid


@pytest.mark.parametrize(
    ("url", "protocol", "base"),
    [
        ("http://h:1", Protocol.OLLAMA, "http://h:1"),
        ("http://h:1", Protocol.OPENAI, "http://h:1/v1"),
        ("http://h:1/v1", Protocol.OPENAI, "http://h:1/v1"),
        ("https://g/v1beta/openai", Protocol.OPENAI, "https://g/v1beta/openai"),
        ("https://a", Protocol.ANTHROPIC, "https://a/v1"),
        ("https://a/v1", Protocol.ANTHROPIC, "https://a/v1"),
        ("https://a/anthropic", Protocol.ANTHROPIC, "https://a/anthropic/v1"),
    ],
)
def test_the_base_url_is_that_of_the_servers_own_clients(url: str, protocol: Protocol, base: str) -> None:
    assert base_url(url, protocol) == base


@pytest.mark.parametrize(
    ("instance", "problem"),
    [
        ("driver: cloud", "instances.x.url: missing; an instance of driver cloud needs a url"),
        ("driver: cloud", "instances.x.protocol: missing; expected openai or anthropic for driver cloud"),
        ("driver: cloud", "instances.x.key_env: missing; driver cloud needs a key: key_env or key_file"),
        ("driver: cloud", "instances.x.models: missing; driver cloud needs the models"),
        (CLOUD.replace("openai", "ollama"), "instances.x.protocol: 'ollama'; expected openai or anthropic"),
        (
            CLOUD.replace("https://x/v1", "http://10.0.0.5/v1"),
            "instances.x.url: 'http://10.0.0.5/v1' would carry the key in clear; expected https://",
        ),
        (f"{CLOUD}, slots: 2", "instances.x.slots: not for driver cloud"),
        (f"{CLOUD}, device: gpu", "instances.x.device: not for driver cloud"),
        (f"{CLOUD}, pinned: true", "instances.x.pinned: not for driver cloud"),
        (f"{CLOUD}, priority: 3", "instances.x.priority: not for driver cloud"),
        (f"{CLOUD}, key_file: k", "instances.x.key_file: beside key_env; expected one of them"),
        (
            CLOUD.replace("KEY", "sk-123"),
            "instances.x.key_env: 'sk-123'; expected the name of an environment",
        ),
        (CLOUD.replace("0.25", "-1"), "instances.x.models.gpt.input_usd_per_mtok: -1; expected 0 or more"),
        (
            CLOUD.replace(", output_usd_per_mtok: 2", ""),
            "instances.x.models.gpt.output_usd_per_mtok: missing; a model without a price is never asked",
        ),
        (
            CLOUD.replace("for: [thinking]", "for: []"),
            "instances.x.models.gpt.for: missing; expected the roles and models that it answers for",
        ),
        (CLOUD.replace("gpt:", "'a b':"), "expected the name of a model, without spaces"),
        ("template: ollama-cpu, protocol: openai", "instances.x.protocol: only for the drivers external"),
        ("template: ollama-cpu, key_env: K", "instances.x.key_env: only for the drivers external"),
        (f"{EXTERNAL}, protocol: anthropic", "instances.x.protocol: 'anthropic'; expected ollama or openai"),
        (f"{EXTERNAL}, models: [m]", "instances.x.models: only for protocol openai"),
        (
            f"{EXTERNAL}, protocol: openai, models: {{m: {{for: [a]}}}}",
            "instances.x.models.m.for: only for driver cloud",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_the_name_of_its_key(
    tmp_path: Path, instance: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(tmp_path, f"instances: {{x: {{{instance}}}}}")
    assert problem in refused.value.message
    assert "c.yaml:1: " in refused.value.message


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("[cpu]", "fallback.order.0: 'cpu' is no instance of driver cloud; expected x"),
        ("[nope]", "fallback.order.0: 'nope' is no instance; expected those of driver cloud: x"),
        ("[x, x]", "fallback.order.1: 'x' is listed twice"),
    ],
)
def test_the_order_names_paid_servers_each_once(tmp_path: Path, order: str, problem: str) -> None:
    text = f"instances: {{cpu: {{template: ollama-cpu}}, x: {{{CLOUD}}}}}\nfallback: {{order: {order}}}"
    with pytest.raises(ConfigurationError) as refused:
        read(tmp_path, text)
    assert problem in refused.value.message


@pytest.mark.parametrize("role", ["target: x", "instances: [x]", "instances: [cpu], keep_warm: [x]"])
def test_a_role_reaches_a_paid_server_by_its_fallback_only(tmp_path: Path, role: str) -> None:
    text = f"instances: {{cpu: {{template: ollama-cpu}}, x: {{{CLOUD}}}}}\nroles: {{thinking: {{{role}}}}}"
    with pytest.raises(ConfigurationError) as refused:
        read(tmp_path, text)
    assert "'x' is no" in refused.value.message


def test_the_fallback_of_the_settings(tmp_path: Path) -> None:
    text = f"instances: {{x: {{{CLOUD}}}}}\nfallback: {{enabled: true, order: [x]}}"
    fallback = to_fallback(read(tmp_path, text).settings.fallback)
    assert fallback == replace(fallback, enabled=True, force_local=False, order=("x",))
