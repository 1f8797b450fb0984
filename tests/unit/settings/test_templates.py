"""Templates from their files, and instances made of them: what is refused, and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manager.domain.instance import DeviceKind, Driver, Limits
from manager.domain.template import CPU_ONLY_ENVIRONMENT, Template
from manager.errors import ConfigurationError
from manager.settings import (
    LoadedSettings,
    Settings,
    auto_gpu_spec,
    load_settings,
    load_templates,
    missing_binds,
    packaged_templates,
    real_writers,
    resolve_instances,
    template_warnings,
    templates,
)
from tests.support.users import NOBODY, give

GOOD = "image: ollama/ollama:1\ndevice: cpu\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "templates"
    made.mkdir()
    return made


def load(directory: Path, **files: str) -> dict[str, Template]:
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return load_templates(Settings.model_validate({"templates": {"dir": directory}}))


def refused(directory: Path, **files: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(directory, **files)
    return caught.value.message.replace(f"{directory}/", "").splitlines()


def configured(tmp_path: Path, text: str) -> LoadedSettings:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ={"HOME": "/home/someone"})


def packaged() -> dict[str, Template]:
    return load_templates(Settings())


def test_the_packaged_templates_keep_within_the_default_allow_lists() -> None:
    assert sorted(packaged()) == ["ollama-cpu", "ollama-gpu"]


def test_the_packaged_cpu_template_writes_the_cpu_layers_out() -> None:
    cpu = packaged()["ollama-cpu"]
    assert cpu.device is DeviceKind.CPU
    assert cpu.env.items() >= CPU_ONLY_ENVIRONMENT.items()
    assert (cpu.limits.memory, cpu.limits.pids, cpu.limits.shm) == (8 * 2**30, 512, 64 * 2**20)


@pytest.mark.parametrize("name", ["ollama-cpu", "ollama-gpu"])
def test_the_packaged_templates_pin_what_ollama_would_guess(name: str) -> None:
    template = packaged()[name]
    assert template.image == "ollama/ollama:0.32.15"
    assert template.env["OLLAMA_KEEP_ALIVE"] == template.env["OLLAMA_LOAD_TIMEOUT"] == "5m"
    assert template.env["OLLAMA_NUM_PARALLEL"] == template.env["OLLAMA_NO_CLOUD"] == "1"
    assert template.env["OLLAMA_MAX_QUEUE"] == "512"
    assert template.env["OLLAMA_NOPRUNE"] == "1"
    assert {"OLLAMA_CONTEXT_LENGTH", "OLLAMA_MAX_LOADED_MODELS"} <= set(template.env)
    assert [(one.source, one.target, one.read_only) for one in template.volumes] == [
        ("ollama-models", "/root/.ollama", False)
    ]
    assert (template.network, template.port, template.reach) == ("ollama-manager", 11434, "auto")


def test_an_installed_wheel_brings_its_own_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_templates() == Path(templates.__file__).resolve().parents[2] / "templates"
    monkeypatch.setattr(templates, "_PACKAGE", tmp_path)
    (tmp_path / "packaged_templates").mkdir()
    assert packaged_templates() == tmp_path / "packaged_templates"


def test_the_file_name_is_the_name_and_other_files_are_left_alone(directory: Path) -> None:
    (directory / "README.md").write_text("x")
    (directory / "b.yml").write_text(GOOD)
    assert list(load(directory, a=GOOD)) == ["a", "b"]


def test_numbers_in_the_environment_stay_as_they_are_written(directory: Path) -> None:
    env = "env: {OLLAMA_A: 1.10, OLLAMA_B: 0123, OLLAMA_C: 1, OLLAMA_D: true, OLLAMA_E: ' x '}\n"
    assert load(directory, a=GOOD + env)["a"].env == {
        "OLLAMA_A": "1.10",
        "OLLAMA_B": "0123",
        "OLLAMA_C": "1",
        "OLLAMA_D": "true",
        "OLLAMA_E": " x ",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "image: ollama/ollama:1\n",
            "a.yaml:1: device: missing; this key is needed (known here: description,",
        ),
        (GOOD + "comand: sh\n", "a.yaml:3: comand: unknown key; allowed: description, image, device, env,"),
        (GOOD + "volume: []\n", "a.yaml:3: volume: unknown key; did you mean 'volumes'? allowed:"),
        (GOOD + "privileged: true\n", "a.yaml:3: privileged: unknown key;"),
        ("image: ollama/ollama:1\ndevice: tpu\n", "a.yaml:2: device: 'tpu'; expected 'cpu' or 'gpu'"),
        ("image: 'a b'\ndevice: cpu\n", "a.yaml:1: image: 'a b'; expected text that matches"),
        (GOOD + "network: host\n", "a.yaml:3: network: 'host'; expected the name of a network, and none of"),
        (GOOD + "network: other\n", "a.yaml:3: network: 'other' is not in allow.networks; allowed: ollama-"),
        (
            "image: a:1\ndevice: cpu\n",
            "a.yaml:1: image: 'a:1' is not in allow.images; allowed: ollama/ollama:*",
        ),
        (GOOD + "env:\n  PATH: x\n", "a.yaml:4: env.PATH: 'PATH' is not in allow.env; allowed: OLLAMA_*,"),
        (GOOD + "env:\n  A B: x\n", "a.yaml:4: env.A B: 'A B' as a key; expected text that matches"),
        (GOOD + "env: x\n", "a.yaml:3: env: 'x'; expected a mapping"),
        (
            GOOD + "env:\n\n  CUDA_VISIBLE_DEVICES: 0\n",
            "a.yaml:5: env.CUDA_VISIBLE_DEVICES: '0' contradicts device: cpu, which sets",
        ),
        (
            GOOD + "volumes:\n  - source: x\n    target: /x\n",
            "a.yaml:4: volumes.0.source: 'x' is not in allow.volumes; allowed: ollama-models",
        ),
        (
            GOOD + "volumes:\n  - {source: /etc,\n     target: /x}\n",
            "a.yaml:4: volumes.0.source: '/etc' is not in allow.binds; allowed: nothing",
        ),
        (
            GOOD + "volumes:\n  - {source: ollama-models,\n     target: x}\n",
            "a.yaml:5: volumes.0.target: 'x'; expected an absolute path without '..'",
        ),
        (
            GOOD + "limits: {memory: much}\n",
            "a.yaml:3: limits.memory: 'much'; expected a size such as 512m or",
        ),
        (GOOD + "limits: {memory: 8}\n", "a.yaml:3: limits.memory: 8; expected 6m or more"),
        (GOOD + "limits: {vram: 1g}\n", "a.yaml:3: limits.vram: a template for the CPU needs no GPU memory"),
        (GOOD + "image: b\n", "a.yaml:3: image: given twice, first in line 1; expected each key once"),
        (GOOD + "--- {}\n", "a.yaml:3: a second document; expected one document a file"),
        ("[]", "a.yaml:1: expected a mapping of keys to values"),
    ],
)
def test_what_a_template_may_not_say_is_refused_with_its_line(
    directory: Path, text: str, problem: str
) -> None:
    (found,) = refused(directory, a=text)
    assert found.startswith(problem)


def test_everything_in_every_file_is_said_at_once(directory: Path) -> None:
    (directory / "Upper.yaml").write_text(GOOD)
    (directory / "b.yml").write_text(GOOD)
    (directory / "d.yaml").mkdir()
    file_names = "expected [a-z][a-z0-9-]*.yaml, because it names the template"
    found = refused(
        directory,
        a="image: evil:1\ndevice: cpu\nport: 0\nenv: {PATH: x}\n",
        b=GOOD + "network: other\n",
        c="device: cpu\nnetwork: other\n",
    )
    assert [": ".join(line.split(": ")[:2]) for line in found] == [
        f"Upper.yaml: 'Upper.yaml' as a file name; {file_names}",
        "a.yaml:3: port",
        "a.yaml:1: image",
        "a.yaml:4: env.PATH",
        "b.yaml:3: network",
        "b.yml: the template 'b' is defined by b.yaml already; expected one file a name",
        "c.yaml:1: image",
        "d.yaml: cannot be read (Is a directory); expected a YAML file",
    ]


def test_a_directory_of_templates_that_is_missing_is_an_error(directory: Path) -> None:
    settings = Settings.model_validate({"templates": {"dir": directory / "gone"}})
    with pytest.raises(ConfigurationError, match=r"gone: templates\.dir: cannot be read \(No such file"):
        load_templates(settings)


def test_instances_are_resolved_in_the_order_of_the_configuration(tmp_path: Path) -> None:
    loaded = configured(
        tmp_path,
        """
instances:
  nas: {driver: external, url: "http://nas:11434", device: gpu, priority: 2}
  unknown: {driver: external, url: "http://other:11434"}
  gpu1: {template: ollama-gpu, ttl_s: 0, start_timeout_s: 9, pinned: true, prewarm: true}
  gpu0: {template: ollama-gpu, device: GPU-1}
  cpu: {template: ollama-cpu}
lifecycle: {ttl_s: 60, stop_timeout_s: 5}
""",
    )
    known = packaged()
    nas, unknown, gpu1, gpu0, cpu = resolve_instances(loaded, known)
    assert (nas.id, nas.driver, nas.device_kind, nas.template, nas.device, nas.url, nas.priority) == (
        "nas",
        Driver.EXTERNAL,
        DeviceKind.GPU,
        None,
        None,
        "http://nas:11434",
        2,
    )
    assert unknown.device_kind is None
    assert (gpu1.id, gpu1.device_kind, gpu1.device, gpu1.pinned, gpu1.prewarm) == (
        "gpu1",
        DeviceKind.GPU,
        "auto",
        True,
        True,
    )
    assert (gpu1.limits.ttl_s, gpu1.limits.start_timeout_s) == (0, 9)
    assert (gpu0.device, gpu0.template) == ("GPU-1", known["ollama-gpu"])
    assert (cpu.driver, cpu.device_kind, cpu.device) == (Driver.DOCKER, DeviceKind.CPU, None)
    assert cpu.limits == Limits(
        ttl_s=60,
        start_timeout_s=300,
        stop_timeout_s=5,
        drain_timeout_s=60,
        probe_interval_s=2,
        resync_interval_s=15,
        vram_wait_s=20,
    )


def test_contradictions_with_the_templates_are_refused_with_their_lines(tmp_path: Path) -> None:
    loaded = configured(
        tmp_path,
        """\
instances:
  a: {template: ollama-gup}
  b:
    template: ollama-cpu
    device: auto
  c: {template: zzz}
  d: {template: ollama-cpu, device: [GPU-1, GPU-2]}
""",
    )
    with pytest.raises(ConfigurationError) as caught:
        resolve_instances(loaded, packaged())
    cpu = "which has device: cpu; leave `device` out, or use a template for the GPU"
    place, known = tmp_path / "c.yaml", "known: ollama-cpu, ollama-gpu"
    assert caught.value.message.splitlines() == [
        f"{place}:2: instances.a.template: 'ollama-gup' is no template; did you mean 'ollama-gpu'? {known}",
        f"{place}:5: instances.b.device: 'auto' contradicts the template 'ollama-cpu', {cpu}",
        f"{place}:6: instances.c.template: 'zzz' is no template; {known}",
        f"{place}:7: instances.d.device: ['GPU-1', 'GPU-2'] contradicts the template 'ollama-cpu', {cpu}",
    ]


# Binds, and what their paths lead to


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Some of a host: a directory that is allowed, beside one that is not, and links."""
    host = tmp_path / "host"
    for directory in ("models/real", "private", "disk/deep"):
        (host / directory).mkdir(parents=True)
    (host / "models" / "out").symlink_to(host / "private")
    (host / "models" / "up").symlink_to("..")
    (host / "models" / "real" / "far").symlink_to("../out")
    (host / "models" / "in").symlink_to("real")
    (host / "models" / "nowhere").symlink_to(host / "gone")
    (host / "linked").symlink_to("disk")
    (host / "disk" / "back").symlink_to(host / "models" / "real")
    return host


def bound(directory: Path, host: Path, source: str, *, engine: str = "unix:///engine.sock") -> str:
    """The source of the bind that a template ends up with."""
    mount = f"{{source: {host}/{source}, target: /models, read_only: true}}"
    (directory / "a.yaml").write_text(f"{GOOD}volumes: [{mount}]\n")
    settings = {
        "templates": {"dir": directory},
        "engine": {"url": engine},
        "allow": {"binds": [f"{host}/models", f"{host}/linked"]},
    }
    (volume,) = load_templates(Settings.model_validate(settings))["a"].volumes
    return volume.source.removeprefix(f"{host}/")


@pytest.mark.parametrize(
    ("source", "real"),
    [
        ("models", "models"),
        ("models/real", "models/real"),
        ("models/not-made-yet", "models/not-made-yet"),
        ("models/in", "models/real"),
        ("linked", "disk"),
        ("linked/deep", "disk/deep"),
        ("disk/deep", "disk/deep"),
        ("disk/back", "models/real"),
    ],
)
def test_a_bind_is_what_its_path_leads_to(directory: Path, host: Path, source: str, real: str) -> None:
    assert bound(directory, host, source) == real


@pytest.mark.parametrize(
    ("source", "real"),
    [
        ("models/out", "/private"),
        ("models/out/below", "/private/below"),
        ("models/real/far", "/private"),
        ("models/up", ""),
        ("models/up/private", "/private"),
        ("models/nowhere", "/gone"),
    ],
)
def test_a_bind_that_leads_out_of_what_is_allowed_is_refused_with_both_names(
    directory: Path, host: Path, source: str, real: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        bound(directory, host, source)
    assert (
        f"a.yaml:3: volumes.0.source: '{host}/{source}' leads to '{host}{real}', which is not in allow.binds"
        in caught.value.message
    )


def test_links_of_this_machine_say_nothing_of_an_engine_elsewhere(directory: Path, host: Path) -> None:
    assert bound(directory, host, "models/out", engine="tcp://elsewhere:2375") == "models/out"


def test_the_writer_of_a_bind_may_be_named_by_either_path(
    tmp_path: Path, directory: Path, host: Path
) -> None:
    mount = f"{{source: {host}/models/in, target: /models}}"
    (directory / "a.yaml").write_text(f"{GOOD}volumes: [{mount}]\n")
    for name in ("in", "real"):
        loaded = configured(
            tmp_path,
            f"templates: {{dir: {directory}}}\nallow: {{binds: ['{host}/models:rw']}}\n"
            f"instances: {{a: {{template: a}}}}\nmodels: {{writers: {{{host}/models/{name}: a}}}}\n",
        )
        resolve_instances(loaded, load_templates(loaded.settings))
        assert real_writers(loaded.settings) == {f"{host}/models/real": "a"}


@pytest.mark.timeout(20)
def test_a_fifo_among_the_templates_is_refused_at_once(directory: Path) -> None:
    os.mkfifo(directory / "a.yaml")
    assert refused(directory) == ["a.yaml: cannot be read (not a regular file); expected a YAML file"]


# What is allowed, and dangerous


def test_without_binds_and_with_the_packaged_templates_there_is_no_warning(tmp_path: Path) -> None:
    assert template_warnings(configured(tmp_path, "")) == ()


def test_dangerous_binds_are_named(tmp_path: Path) -> None:
    (tmp_path / "proc").symlink_to("/proc")
    loaded = configured(
        tmp_path,
        f"allow: {{binds: [/, /srv/models, {tmp_path}/proc, /engine/sock, {tmp_path}/private:rw, /keys]}}\n"
        "engine: {url: 'unix:///engine/sock/docker.sock'}\n"
        f"state: {{dir: {tmp_path}/private/state}}\nserver: {{key_file: /keys/one}}\n",
    )
    start, socket = "allow.binds: ", "the engine's socket, which makes a container root on the host"
    assert template_warnings(loaded) == (
        f"{start}'/' lets templates mount the whole file system of the host",
        f"{start}'{tmp_path}/proc' lets templates mount the host's processes",
        f"{start}'/engine/sock' lets templates mount {socket}",
        f"{start}'{tmp_path}/private:rw' lets templates mount the daemon's state",
        f"{start}'/keys' lets templates mount the key",
    )
    loaded = configured(tmp_path, f"allow: {{binds: ['{tmp_path}']}}\nstate: {{dir: /var/x}}\n")
    (warning,) = template_warnings(loaded)
    assert warning.endswith("lets templates mount the configuration")


def test_an_engine_elsewhere_has_no_socket_here(tmp_path: Path) -> None:
    loaded = configured(tmp_path, "allow: {binds: [/engine]}\nengine: {url: 'tcp://engine:2375'}\n")
    assert template_warnings(loaded) == ()


BINDS = """volumes:
- {source: HOST/there, target: /a}
- {source: HOST/gone, target: /b}
- {source: HOST/file/below, target: /c}
- {source: ollama-models, target: /d}
"""


def with_binds(tmp_path: Path, directory: Path, engine: str) -> LoadedSettings:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (directory / "a.yaml").write_text(GOOD + BINDS.replace("HOST", str(tmp_path)))
    return configured(
        tmp_path,
        f"templates: {{dir: {directory}}}\nallow: {{binds: ['{tmp_path}:rw']}}\n"
        f"engine: {{url: '{engine}'}}\n",
    )


def test_binds_of_directories_that_do_not_exist_are_named(tmp_path: Path, directory: Path) -> None:
    loaded = with_binds(tmp_path, directory, "unix:///run/docker.sock")
    says = "on this machine; a container with this mount does not start"
    assert missing_binds(loaded.settings, load_templates(loaded.settings)) == (
        f"template a: volumes.1.source: there is no {tmp_path}/gone {says}",
        f"template a: volumes.2.source: there is no {tmp_path}/file/below {says}",
    )


def test_directories_of_an_engine_elsewhere_are_not_looked_for(tmp_path: Path, directory: Path) -> None:
    loaded = with_binds(tmp_path, directory, "tcp://engine:2375")
    assert missing_binds(loaded.settings, load_templates(loaded.settings)) == ()


def test_a_directory_that_this_user_cannot_look_for_is_not_called_missing(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = with_binds(tmp_path, directory, "unix:///run/docker.sock")
    templates = load_templates(loaded.settings)

    def refuse(_path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr("manager.settings.templates.Path.stat", refuse)
    assert missing_binds(loaded.settings, templates) == ()


def test_templates_that_others_can_change_are_named(tmp_path: Path, directory: Path) -> None:
    loaded = configured(tmp_path, f"templates: {{dir: {directory}}}\n")
    (directory / "a.yaml").write_text(GOOD)
    (directory / "b.yaml").symlink_to("gone")
    assert template_warnings(loaded) == ()
    directory.chmod(0o777)
    give(directory / "a.yaml")
    (directory / "a.yaml").chmod(0o666)
    file, open_to_all = f"{directory}/a.yaml", "every user may write to it (mode"
    assert template_warnings(loaded) == (
        f"{directory}: {open_to_all} 0777); close it with: chmod o-w {directory}",
        f"{file}: it belongs to nobody (uid {NOBODY})",
        f"{file}: {open_to_all} 0666); close it with: chmod o-w {file}",
    )
    directory.chmod(0o1777)
    assert len(template_warnings(loaded)) == 2


def test_without_any_template_none_is_known(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^default: instances\.cpu\.template: 'ollama-cpu' is no templ.*none$"
    ):
        resolve_instances(configured(tmp_path, ""), {})


def test_a_card_that_was_found_gets_an_instance_of_the_gpu_template() -> None:
    known = packaged()
    spec = auto_gpu_spec("gpu3", Settings(), known)
    assert (spec.id, spec.driver, spec.device_kind, spec.device) == (
        "gpu3",
        Driver.DOCKER,
        DeviceKind.GPU,
        "auto",
    )
    assert spec.template is known["ollama-gpu"]
    assert spec.limits.ttl_s == 900


def test_a_card_that_was_found_needs_the_gpu_template() -> None:
    cpu = packaged()["ollama-cpu"]
    with pytest.raises(
        ConfigurationError, match=r"gpus: the template 'ollama-gpu' is missing, and gpu0 was found"
    ):
        auto_gpu_spec("gpu0", Settings(), {"ollama-cpu": cpu})
    with pytest.raises(
        ConfigurationError, match="has device: cpu, and gpu0 was found by gpus: auto; expected a"
    ):
        auto_gpu_spec("gpu0", Settings(), {"ollama-gpu": cpu})
