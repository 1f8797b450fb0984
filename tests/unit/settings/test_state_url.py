"""The address of a shared database: what is one, and that no password of it is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from manager.cli.effective import effective_yaml
from manager.errors import ConfigurationError
from manager.settings import load_settings
from manager.settings.addresses import postgresql_url, without_credentials, without_password

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://om@db.example:5432/om",
        "postgres://db/om",
        "postgresql:///om?host=/run/postgresql&user=om",
        "postgresql://om:a%2Fb@[::1]:5432/om?sslmode=verify-full&passfile=/etc/om/pgpass",
        "postgresql://om@one:5432,two:5433/om?target_session_attrs=read-write",
    ],
)
def test_addresses_as_libpq_has_them_are_taken(url: str) -> None:
    assert postgresql_url(url) == url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "expected postgresql://"),
        ("sqlite:///x", "expected postgresql://"),
        ("postgresql:om", "expected postgresql://"),
        ("postgresql://db", "with the name of a database"),
        ("postgresql://db/", "with the name of a database"),
        ("postgresql://db/a/b", "with the name of a database"),
        ("postgresql://db/om#x", "with the name of a database"),
        ("postgresql://db/o m", "expected postgresql://"),
        (f"postgresql://om:{SECRET}/x@db/om", "%2F or %40"),
        (f"postgresql://om:{SECRET}@x@db/om", "%2F or %40"),
        (f"postgresql://om:{SECRET}/db", "%2F or %40"),
        ("postgresql://db:port/om", "%2F or %40"),
        ("postgresql://db/om?sslmode", "expected postgresql://"),
        ("postgresql://db/om?options=-c", "unknown key 'options' after the ?; allowed: channel_binding,"),
        ("postgresql://db/om?connect_timeout=90", "unknown key 'connect_timeout'"),
    ],
)
def test_others_are_refused_with_what_is_allowed(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        postgresql_url(url)
    assert says in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://om:{SECRET}@db/om",
        f"postgresql://om:%40{SECRET}@db:5432/om?sslmode=require",
        f"postgresql://db/om?user=om&password={SECRET}",
        f"postgresql://om:{SECRET}@db/om?sslpassword={SECRET}&passfile=/x",
    ],
)
def test_a_password_is_shown_nowhere(tmp_path: Path, url: str) -> None:
    loaded = load_settings(environ={"HOME": str(tmp_path), "OLLAMA_MANAGER_STATE__URL": url})
    assert loaded.settings.state.url == url
    shown = (
        without_password(url),
        without_credentials(url),
        repr(loaded.settings),
        loaded.settings.model_dump_json(),
        effective_yaml(loaded),
    )
    assert [text for text in shown if SECRET in text] == []
    assert "db" in without_password(url)


@pytest.mark.parametrize(
    "url", [f"postgresql://om:{SECRET}/{SECRET}@db/a/b", f"postgresql://db/om?password={SECRET}&x=1"]
)
def test_a_refusal_names_the_field_and_shows_no_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_settings(environ={"HOME": str(tmp_path), "OLLAMA_MANAGER_STATE__URL": url})
    assert "state.url" in refused.value.message
    assert SECRET not in refused.value.message + str(refused.value.details)


def test_what_has_no_password_stays_as_it_is() -> None:
    url = "postgresql://om@db:5432/om?passfile=/etc/om/pgpass"
    assert without_password(url) == url
