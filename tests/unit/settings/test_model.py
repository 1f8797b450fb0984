"""What each setting may be: every refusal with its file, line and key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import ConfigurationError
from manager.settings.addresses import is_loopback
from manager.settings.load import load_settings
from manager.settings.model import Settings

if TYPE_CHECKING:
    from pathlib import Path

ENVIRON = {"HOME": "/home/someone"}
NAS = "driver: external, url: 'http://nas:11434'"
ID = "a" * 32


def read(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ=ENVIRON).settings


REFUSED: list[tuple[str, str]] = [
    # wrong types and unknown keys
    ("xyz: 1", "xyz: unknown key; allowed: server, state, manager_id,"),
    ("sever: {port: 1}", "sever: unknown key; did you mean 'server'? allowed: server,"),
    ("server: 1", "server: 1; expected a mapping"),
    ("server:", "server: nothing; expected a mapping"),
    ("server: {port: '80'}", "server.port: '80'; expected a whole number"),
    ("server: {port: 80.5}", "server.port: 80.5; expected a whole number"),
    ("server: {port: true}", "server.port: true; expected a whole number"),
    ("server: {port: [1]}", "server.port: a list; expected a whole number"),
    ("server: {port: {a: 1}}", "server.port: a mapping; expected a whole number"),
    ("server: {port: null}", "server.port: nothing; expected a whole number"),
    ("server: {host: 1}", "server.host: 1; expected text"),
    ("manager_id: 1", "manager_id: 1; expected text"),
    ("allow: {images: ollama/ollama}", "allow.images: 'ollama/ollama'; expected a list"),
    ("allow: {images: [1]}", "allow.images.0: 1; expected text"),
    ("allow: {images: ['']}", "allow.images.0: ''; expected text that is not empty"),
    ("instances: [cpu]", "instances: a list; expected a mapping"),
    ("instances: {cpu: ollama-cpu}", "instances.cpu: 'ollama-cpu'; expected a mapping"),
    ("templates: {dir: 1}", "templates.dir: 1; expected a path"),
    ("templates: {dir: ''}", "templates.dir: ''; expected a path"),
    ("instances: {cpu: {template: a, pinned: yes}}", "instances.cpu.pinned: 'yes'; expected true or false"),
    ("instances: {cpu: {template: a, serves: []}}", "instances.cpu.serves: a list; expected at least one of"),
    ("instances: {cpu: {template: a, serves: [hear]}}", "instances.cpu.serves.0: 'hear'; expected"),
    ("gateway: {max_upload: lots}", "gateway.max_upload: 'lots'; expected a size such as"),
    (
        "lifecycle: {ttl_s: 15 minutes}",
        "lifecycle.ttl_s: '15 minutes'; expected seconds, or a duration such as 90s, 15m, 2h, 1h30m or 30d",
    ),
    ("runs: {concurrency: 0}", "runs.concurrency: 0; expected 1 or more"),
    ("runs: {max_body: much}", "runs.max_body: 'much'; expected a size such as"),
    ("runs: {expires_s: 30d}", "runs.expires_s: 30d; expected at most runs.retention_s, 7d"),
    ("runs: {max_stored: 8m}", "runs.max_stored: expected room for one body and one result"),
    ("breaker: {max_open_s: 10}", "breaker.max_open_s: 10, less than open_s; expected 30 or more"),
    ("breaker: {failures: 0}", "breaker.failures: 0; expected 1 or more"),
    ("roles: {output: {queue: {wait_s: soon}}}", "roles.output.queue.wait_s: 'soon'; expected seconds, or a"),
    (
        "roles: {output: {instances: []}}",
        "roles.output.instances: a list; expected at least one instance, or",
    ),
    ("roles: {output: {instances: [cpu, cpu]}}", "roles.output.instances: a list; 'cpu' is listed twice"),
    ("roles: {output: {mode: later}}", "roles.output.mode: 'later'; expected 'sync' or 'async'"),
    ("roles: {output: {instances: [gone]}}", "roles.output.instances: 'gone' is no instance; expected"),
    ("roles: {output: {reserved: 1, instances: [cpu]}}", "roles.output.reserved: cpu has no slots; set inst"),
    ("instances: {gpu0: {template: a, slots: 0}}", "instances.gpu0.slots: 0; expected 1 or more"),
    ("instances: {gpu0: {template: a, max_parameters: big}}", "instances.gpu0.max_parameters: 'big'; expect"),
    ("instances: {gpu0: {template: a, device: []}}", "instances.gpu0.device: a list; an empty list; expect"),
    ("instances: {gpu0: {template: a, device: [auto, all]}}", "instances.gpu0.device: a list; 'auto' in a l"),
    (
        "instances: {gpu0: {template: a, device: [00000000:01:00.0, '01:00.0']}}",
        "instances.gpu0.device: a list; '01:00.0' is listed twice; expected each card once",
    ),
    (
        "instances: {both: {template: a, device: [GPU-8c1f2d34, MIG-1]}}",
        "instances.both.device: a list; 'MIG-1' is a slice of a card (MIG), and a program uses one",
    ),
    (
        "instances: {nas: {driver: external, url: 'http://nas:11434', device: [GPU-1, GPU-2]}}",
        "instances.nas.device: ['GPU-1', 'GPU-2']; expected cpu or gpu for driver external",
    ),
    ("lifecycle: {ttl_s: true}", "lifecycle.ttl_s: true; expected a number"),
    # bounds
    ("server: {port: 0}", "server.port: 0; expected a port, 1-65535"),
    ("server: {port: 65536}", "server.port: 65536; expected a port, 1-65535"),
    ("engine: {timeout_s: 0}", "engine.timeout_s: 0; expected a number above 0"),
    ("engine: {timeout_s: 1000000}", "engine.timeout_s: 1000000; expected 86400 or less"),
    ("lifecycle: {ttl_s: -1}", "lifecycle.ttl_s: -1; expected 0 or more"),
    ("lifecycle: {ttl_s: 1.0e+9}", "lifecycle.ttl_s: 1000000000.0; expected 31622400 or less"),
    ("lifecycle: {ttl_s: .inf}", "lifecycle.ttl_s: inf; expected a finite number"),
    ("lifecycle: {start_timeout_s: 0}", "lifecycle.start_timeout_s: 0; expected a number above 0"),
    ("lifecycle: {stop_timeout_s: 0}", "lifecycle.stop_timeout_s: 0; expected a number above 0"),
    ("lifecycle: {drain_timeout_s: -1}", "lifecycle.drain_timeout_s: -1; expected 0 or more"),
    ("lifecycle: {probe_interval_s: 0}", "lifecycle.probe_interval_s: 0; expected 0.01 or more"),
    ("lifecycle: {resync_interval_s: 0}", "lifecycle.resync_interval_s: 0; expected 0.01 or more"),
    ("lifecycle: {vram_wait_s: -1}", "lifecycle.vram_wait_s: -1; expected 0 or more"),
    ("lifecycle: {max_running: 0}", "lifecycle.max_running: 0; expected 1 or more"),
    (
        "instances: {cpu: {template: a, priority: 1001}}",
        "instances.cpu.priority: 1001; expected 1000 or less",
    ),
    # enumerations
    ("gpus: off", "gpus: 'off'; expected 'auto' or 'none'"),
    ("log: {format: text}", "log.format: 'text'; expected 'auto', 'json' or 'console'"),
    ("log: {level: INFO}", "log.level: 'INFO'; expected 'debug', 'info', 'warning' or 'error'"),
    (
        "instances: {cpu: {driver: podman, template: a}}",
        "instances.cpu.driver: 'podman'; expected 'docker', 'external', 'cloud' or 'swarm'",
    ),
    # names and addresses
    *(
        (f"budgets: [{{scope: global, period: day, hard_usd: {given}}}]", f"budgets.0.hard_usd: {problem}")
        for given, problem in (
            ("abc", "'abc'; expected a number"),
            ("[1]", "a list; expected a number"),
            ("0.0000001", "1e-07; expected at most 6 decimal places"),
        )
    ),
    ("manager_id: -x", "manager_id: '-x'; expected text that matches"),
    ("manager_id: ''", "manager_id: ''; expected text that matches"),
    ("manager_id: a/b", "manager_id: 'a/b'; expected text that matches"),
    ("instances: {CPU: {template: a}}", "instances.CPU: 'CPU' as a key; expected text that matches"),
    ("instances: {a_b: {template: a}}", "instances.a_b: 'a_b' as a key; expected text that matches"),
    ("instances: {'': {template: a}}", "instances.: '' as a key; expected text that matches"),
    (f"instances: {{a{ID}: {{template: a}}}}", f"instances.a{ID}: 'a{ID}' as a key; expected text"),
    (
        f"manager_id: {'m' * 30}\ninstances: {{{ID}: {{template: a}}}}",
        f"instances.{ID}: its container's name has 70 characters; at most 63: shorten it or manager_id",
    ),
    ("server: {host: 'a b'}", "server.host: 'a b'; expected an address or a host name, without a port"),
    ("server: {host: '127.0.0.1:80'}", "server.host: '127.0.0.1:80'; expected an address or a host name"),
    ("server: {allowed_hosts: ['a:80']}", "server.allowed_hosts.0: 'a:80'; expected an address or a host"),
    ("server: {allowed_origins: ['a.b']}", "server.allowed_origins.0: 'a.b'; expected SCHEME://HOST[:PORT]"),
    (
        "server: {allowed_origins: ['http://a.b*']}",
        "server.allowed_origins.0: 'http://a.b*'; expected SCHEME",
    ),
    ("server: {allowed_origins: ['https://a.*']}", "server.allowed_origins.0: 'https://a.*'; expected SCH"),
    ("server: {allowed_hosts: ['*']}", "server.allowed_hosts.0: '*'; expected an address or a host name"),
    (
        "server: {host: 0.0.0.0}",
        "server.host: '0.0.0.0' can be reached from other machines; set server.key_file, or listen on",
    ),
    ("server: {host: '::'}", "server.host: '::' can be reached from other machines; set server.key_file"),
    ("server: {host: myhost}", "server.host: 'myhost' can be reached from other machines; set"),
    ("engine: {url: 'unix://'}", "engine.url: 'unix://'; expected unix:///SOCKET, tcp://HOST:PORT,"),
    ("engine: {url: /var/run/docker.sock}", "engine.url: '/var/run/docker.sock'; expected unix:///SOCKET"),
    ("engine: {url: 'tcp://host'}", "engine.url: 'tcp://host'; expected unix:///SOCKET"),
    ("engine: {url: 'tcp://:1'}", "engine.url: 'tcp://:1'; expected unix:///SOCKET"),
    ("engine: {url: 'tcp://host:99999'}", "engine.url: 'tcp://host:99999'; expected unix:///SOCKET"),
    # the allow-list of binds
    ("allow: {binds: [srv]}", "allow.binds.0: 'srv'; expected an absolute directory without '..'"),
    ("allow: {binds: ['/srv:ro']}", "allow.binds.0: '/srv:ro'; expected an absolute directory without '..'"),
    ("allow: {binds: ['/srv/../etc']}", "allow.binds.0: '/srv/../etc'; expected an absolute directory"),
    # instances of docker
    (
        "instances: {cpu: {}}",
        "instances.cpu.template: missing; an instance of driver docker needs a template",
    ),
    (
        "instances: {cpu: {template: a, url: 'http://x'}}",
        "instances.cpu.url: only for driver external; the endpoint follows from the template",
    ),
    (
        "instances: {gpu0: {template: a, device: gpu}}",
        "instances.gpu0.device: 'gpu'; expected auto, all, a UUID (GPU-… or MIG-…), a PCI bus id such as",
    ),
    (
        "instances: {gpu0: {template: a, device: '0'}}",
        "instances.gpu0.device: '0'; expected auto, all, a UUID",
    ),
    ("instances: {gpu0: {template: a, device: 0}}", "instances.gpu0.device: 0; expected text"),
    # external instances
    ("instances: {nas: {driver: external}}", "instances.nas.url: missing; an instance of driver external"),
    *(
        (
            f"instances: {{nas: {{{NAS}, {key}: {value}}}}}",
            f"instances.nas.{key}: not for driver external, whose server is started and stopped by",
        )
        for key, value in [
            ("template", "ollama-cpu"),
            ("ttl_s", 0),
            ("start_timeout_s", 1),
            ("pinned", "false"),
            ("prewarm", "true"),
        ]
    ),
    (
        f"instances: {{nas: {{{NAS}, device: auto}}}}",
        "instances.nas.device: 'auto'; expected cpu or gpu for driver external",
    ),
    *(
        (
            f"instances: {{nas: {{driver: external, url: '{url}'}}}}",
            f"instances.nas.url: '{url}'; expected http://HOST[:PORT] or https://HOST[:PORT]",
        )
        for url in [
            "nas:11434",
            "ftp://nas",
            "http://",
            "http://nas:0",
            "http://nas:99999",
            "http://n as",
            "h",
        ]
    ),
    *(
        (
            f"instances: {{nas: {{driver: external, url: '{url}'}}}}",
            f"instances.nas.url: '{url}'; expected a URL without credentials, query and fragment",
        )
        for url in ["http://nas?a=1", "http://nas#a"]
    ),
    (
        "instances: {nas: {driver: external, url: 'http://localhost:11435'}}",
        "instances.nas.url: this is the daemon's own address; expected another server's",
    ),
    # schedules
    (
        "schedules: [{action: reap}]",
        "schedules.0.cron: missing; this key is needed (known here: cron, action,",
    ),
    ("schedules: [{cron: '0 8 * * *'}]", "schedules.0.action: missing; this key is needed"),
    (
        "schedules: [{cron: '0 8 * * *', action: restart, instance: cpu}]",
        "schedules.0.action: 'restart'; expected 'start', 'stop' or 'reap'",
    ),
    ("schedules: [{cron: '0 8 * *', action: reap}]", "schedules.0.cron: '0 8 * *'; '0 8 * *' has 4 fields"),
    (
        "schedules: [{cron: '60 8 * * *', action: reap}]",
        "schedules.0.cron: '60 8 * * *'; the minute '60': no such minute; expected 0-59",
    ),
    (
        "schedules: [{cron: '0 24 * * *', action: reap}]",
        "schedules.0.cron: '0 24 * * *'; the hour '24': no such hour",
    ),
    (
        "schedules: [{cron: '0 8 0 * *', action: reap}]",
        "schedules.0.cron: '0 8 0 * *'; the day of the month '0': no such day of the",
    ),
    (
        "schedules: [{cron: '0 8 * 13 *', action: reap}]",
        "schedules.0.cron: '0 8 * 13 *'; the month '13': no such month; expected 1-12 or jan-dec",
    ),
    (
        "schedules: [{cron: '0 8 * * 8', action: reap}]",
        "schedules.0.cron: '0 8 * * 8'; the weekday '8': no such weekday; expected 0-7 or sun-sat",
    ),
    (
        "schedules: [{cron: '*/0 * * * *', action: reap}]",
        "schedules.0.cron: '*/0 * * * *'; the minute '*/0': a step of 0",
    ),
    (
        "schedules: [{cron: '0 8 31 2 *', action: reap}]",
        "schedules.0.cron: '0 8 31 2 *'; '0 8 31 2 *' never fires",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: start}]",
        "schedules.0.instance: missing; start needs the id of an instance",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: reap, instance: cpu}]",
        "schedules.0.instance: reap goes over all instances; leave `instance` out",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: stop, instance: nas}]",
        "schedules.0.instance: 'nas' is no instance; expected cpu or gpuN (gpus: auto)",
    ),
    (
        "gpus: none\ninstances: {}\nschedules: [{cron: '0 8 * * *', action: stop, instance: gpu0}]",
        "schedules.0.instance: 'gpu0' is no instance; expected nothing",
    ),
    (
        f"instances: {{nas: {{{NAS}}}}}\nschedules: [{{cron: '0 8 * * *', action: stop, instance: nas}}]",
        "schedules.0.instance: 'nas' has driver external and cannot be started or stopped from here",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: reap, timezone: Europe/Berlim}]",
        "schedules.0.timezone: 'Europe/Berlim'; expected a time zone such as Europe/Berlin; did you mean",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: reap, timezone: ../../etc/passwd}]",
        "schedules.0.timezone: '../../etc/passwd'; expected a time zone such as Europe/Berlin",
    ),
    (
        "schedules: [{cron: '0 8 * * *', action: reap, timezone: Europe}]",
        "schedules.0.timezone: 'Europe'; expected a time zone such as Europe/Berlin",
    ),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_a_wrong_setting_is_refused_with_file_line_and_key(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, "\n\n" + text + "\n")
    (line,) = caught.value.message.splitlines()
    # The last line of the text is the wrong one, except where a name is too long only together with another.
    where = 2 + len(text.splitlines())
    assert line.startswith(f"{tmp_path / 'c.yaml'}:{where}: {problem}")
    assert caught.value.code == "configuration_invalid"


ACCEPTED: list[tuple[str, Any]] = [
    ("manager_id: lab_2.x", lambda s: s.manager_id == "lab_2.x"),
    ("server: {host: '[::1]'}", lambda s: s.server.host == "::1"),
    ("server: {host: 127.0.0.2}", lambda s: s.server.host == "127.0.0.2"),
    ("server: {host: 0.0.0.0, key_file: /k}", lambda s: s.server.host == "0.0.0.0"),
    (
        "server: {allowed_hosts: [NAS.local, '::1']}",
        lambda s: s.server.allowed_hosts == ("nas.local", "[::1]"),
    ),
    ("engine: {url: 'https://engine:2376'}", lambda s: s.engine.url == "https://engine:2376"),
    ("lifecycle: {ttl_s: 15m, start_timeout_s: 2h}", lambda s: s.lifecycle.ttl_s == 900),
    (
        "instances: {g: {template: a, device: [GPU-8c1f2d34, 00000000:41:00.0], max_parameters: 14b}}",
        lambda s: (
            (s.instances["g"].device, s.instances["g"].max_parameters)
            == (("GPU-8c1f2d34", "00000000:41:00.0"), 14_000_000_000)
        ),
    ),
    (
        "roles: {output: {queue: {length: 3, wait_s: 2m}, attempt_timeouts_s: [45, 1m]}}",
        lambda s: (s.roles["output"].queue.wait_s, s.roles["output"].attempt_timeouts_s) == (120, (45, 60)),
    ),
    ("lifecycle: {ttl_s: 0, drain_timeout_s: 0}", lambda s: s.lifecycle.ttl_s == 0),
    ("allow: {binds: [/srv, '/data:rw']}", lambda s: s.allow.binds == ("/srv", "/data:rw")),
    *(
        (
            f"instances: {{g: {{template: a, device: {device}}}}}",
            lambda s, device=device: s.instances["g"].device == (device,),
        )
        for device in [
            "auto",
            "all",
            "GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90",
            "MIG-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90",
            "MIG-GPU-8c1f2d34/1/0",
            "0000:01:00.0",  # a number in base sixty to YAML 1.1
            "00000000:41:00.0",
            "01:00.0",
        ]
    ),
    (
        "instances: {nas: {driver: external, url: 'http://nas:11434/', device: gpu, priority: 3}}",
        lambda s: s.instances["nas"].url == "http://nas:11434",
    ),
    (
        "instances: {nas: {driver: external, url: 'https://[fe80::1]/ollama'}}",
        lambda s: s.instances["nas"].url == "https://[fe80::1]/ollama",
    ),
    (
        "schedules: [{cron: '0 8 * * mon-fri', action: start, instance: gpu7, timezone: Europe/Berlin}]",
        lambda s: s.schedules[0].instance == "gpu7",
    ),
    (
        "schedules: [{cron: '0 0 * * 7', action: reap, timezone: null}]",
        lambda s: s.schedules[0].timezone is None,
    ),
    (
        f"manager_id: {'m' * 48}\ninstances: {{{ID}: {{{NAS}}}}}",  # an external one has no container
        lambda s: s.instances[ID].template is None,
    ),
]


@pytest.mark.parametrize(("text", "holds"), ACCEPTED)
def test_what_is_allowed_is_read(tmp_path: Path, text: str, holds: Any) -> None:
    assert holds(read(tmp_path, text))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("127.1", False),
    ],
)
def test_only_what_nobody_else_reaches_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_contradiction_shows_in_a_plain_construction_too() -> None:
    with pytest.raises(ValueError, match=r"template: missing; an instance of driver docker needs a template"):
        Settings.model_validate({"instances": {"cpu": {}}})
