"""What a template may ask for: the schema, the allow-lists, and that nothing gets past them together."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from manager.domain.container import container_request
from manager.domain.instance import DeviceKind
from manager.domain.template import (
    CPU_ONLY_ENVIRONMENT,
    Template,
    Volume,
    bind_dangers,
    parse_size,
    refusals,
)

ALLOW: dict[str, tuple[str, ...]] = {
    "images": ("ollama/ollama:*", "registry.example:5000/team/*:*"),
    "env": ("OLLAMA_*", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
    "networks": ("ollama-manager",),
    "volumes": ("ollama-models", "team-*"),
    "binds": ("/srv/models", "/srv/scratch:rw"),
}
GIB = 2**30
DIGEST = "sha256:" + "a" * 64


def template(**values: Any) -> Template:
    return Template.model_validate({"image": "ollama/ollama:1", "device": "cpu", **values})


def refused(one: Template, **lists: tuple[str, ...]) -> list[tuple[str, str]]:
    found = refusals(one, real={}, **(ALLOW | lists))
    return [(".".join(map(str, refusal.key)), refusal.message) for refusal in found]


def mount(source: str, target: str = "/models", *, read_only: bool = False) -> dict[str, Any]:
    return {"source": source, "target": target, "read_only": read_only}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        (512, 512),
        ("512b", 512),
        ("1k", 1024),
        ("64m", 64 * 2**20),
        ("8g", 8 * GIB),
        ("8G", 8 * GIB),
        ("8gb", 8 * GIB),
        ("8GiB", 8 * GIB),
        (" 8 g ", 8 * GIB),
        ("1.5g", 3 * GIB // 2),
        ("2t", 2 * 2**40),
    ],
)
def test_sizes_are_read_in_powers_of_1024(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "-1", "1.5.5g", "8x", "8 gig", "٣g", None, True, "1e3", "9" * 400])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", 0, -1, "0.1", 2**63, "999999999t"])
def test_a_size_that_no_engine_can_count_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="above zero and below 8 EiB"):
        parse_size(text)


def test_a_template_needs_only_an_image_and_a_device() -> None:
    one = template()
    assert (one.network, one.port, one.reach, one.ready.path) == (
        "ollama-manager",
        11434,
        "auto",
        "/api/version",
    )
    assert (one.limits.memory, one.limits.pids, one.limits.shm, one.limits.vram) == (None, 512, None, None)
    assert refused(one) == []


def test_numbers_and_booleans_in_the_environment_become_text() -> None:
    one = template(env={"OLLAMA_A": 1, "OLLAMA_B": True, "OLLAMA_C": 1.5, "OLLAMA_D": "x"})
    assert one.env == {"OLLAMA_A": "1", "OLLAMA_B": "true", "OLLAMA_C": "1.5", "OLLAMA_D": "x"}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"command": "sh"}, "command"),
        ({"entrypoint": ["sh"]}, "entrypoint"),
        ({"privileged": True}, "privileged"),
        ({"cap_add": ["SYS_ADMIN"]}, "cap_add"),
        ({"devices": ["/dev/kfd"]}, "devices"),
        ({"pid": "host"}, "pid"),
        ({"ports": ["80:80"]}, "ports"),
        ({"volumes": [mount("a") | {"driver": "nfs"}]}, "volumes.0.driver"),
        ({"limits": {"cpus": 1}}, "limits.cpus"),
        ({"device": "tpu"}, "device"),
        ({"device": None}, "device"),
        ({"reach": "host"}, "reach"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": True}, "port"),
        ({"port": "80"}, "port"),
        ({"env": ["OLLAMA_A=1"]}, "env"),
        ({"env": {"OLLAMA_A": None}}, "env.OLLAMA_A"),
        ({"env": {"OLLAMA_A": ["x"]}}, "env.OLLAMA_A"),
        ({"env": {"OLLAMA_A": "x\0y"}}, "env.OLLAMA_A"),
        ({"env": {"": "x"}}, "env..[key]"),
        ({"env": {"LD_PRELOAD=x;OLLAMA_A": "x"}}, "env.LD_PRELOAD=x;OLLAMA_A.[key]"),
        ({"env": {"OLLAMA A": "x"}}, "env.OLLAMA A.[key]"),
        ({"env": {1: "x"}}, "env.1.[key]"),
        ({"image": ""}, "image"),
        ({"image": "ollama/ollama:5000/evil:1"}, "image"),
        ({"image": "Ollama/Ollama:1"}, "image"),
        ({"image": "ollama/ollama:"}, "image"),
        ({"image": "ollama/ollama:1 --privileged"}, "image"),
        ({"image": "ollama/ollama:1\n"}, "image"),
        ({"image": "ollama/ollama@sha256:short"}, "image"),
        ({"image": "a/" * 200 + "b"}, "image"),
        ({"network": "host"}, "network"),
        ({"network": "none"}, "network"),
        ({"network": "default"}, "network"),
        ({"network": "container:abc"}, "network"),
        ({"network": ""}, "network"),
        ({"volumes": [mount("")]}, "volumes.0.source"),
        ({"volumes": [mount("../etc")]}, "volumes.0.source"),
        ({"volumes": [mount("models:/etc")]}, "volumes.0.source"),
        ({"volumes": [mount("/srv/models/../../etc")]}, "volumes.0.source"),
        ({"volumes": [mount("/srv/models:/etc")]}, "volumes.0.source"),
        ({"volumes": [mount("/srv/models\n")]}, "volumes.0.source"),
        ({"volumes": [mount("m", "models")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "/models/..")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "/models:rw")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "/")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "//")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "/dev/dri")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "//proc")]}, "volumes.0.target"),
        ({"volumes": [mount("m", "/./sys/fs")]}, "volumes.0.target"),
        *(
            ({"volumes": [mount("m", target)]}, "volumes.0.target")
            for target in (
                "/bin",
                "/bin/",
                "//bin",
                "/usr",
                "/usr/bin",
                "/usr/lib/ollama",
                "/lib",
                "/lib64/x",
                "/sbin",
                "/etc",
                "/etc/ld.so.preload",
                "/boot",
                "/run/secrets",
                "/var/run/docker.sock",
                "/var/run",
                "/var/lock",
                "/var",
                "/opt",
                "/home",
                "/root",
                "/app",
                "/sys",
                "/dev",
            )
        ),
        ({"volumes": [{"source": "m", "target": "/m", "read_only": "no"}]}, "volumes.0.read_only"),
        ({"limits": {"memory": "lots"}}, "limits.memory"),
        ({"limits": {"memory": "8"}}, "limits.memory"),
        ({"limits": {"shm": "0"}}, "limits.shm"),
        ({"limits": {"pids": 1}}, "limits.pids"),
        ({"limits": {"pids": True}}, "limits.pids"),
        ({"ready": {"path": "api/version"}}, "ready.path"),
        ({"ready": {"path": "/a b"}}, "ready.path"),
        ({"ready": {"path": "/a\r\nHost: x"}}, "ready.path"),
    ],
)
def test_the_schema_refuses(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        template(**values)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [key]


@pytest.mark.parametrize(
    "target",
    [
        "/root/.ollama", "/root/.ollama/models", "/models", "/data", "/mnt", "/mnt/a", "/srv", "/opt/models",
        "/home/ollama/.ollama", "/var/lib/ollama", "/var/cache", "/tmp", "/binaries", "/etcetera",
        "/app/data",
    ],
)  # fmt: skip
def test_a_directory_of_its_own_is_a_target(target: str) -> None:
    assert Volume(source="m", target=target).target == target


def test_a_refused_target_says_what_is_allowed() -> None:
    with pytest.raises(
        ValidationError, match=r"such as /root/\.ollama, /models or /data: none in /bin, /boot"
    ):
        Volume(source="m", target="/usr/bin")


def binds_refused(
    source: str, real: dict[str, str], *, binds: tuple[str, ...] = ("/srv/models",)
) -> list[str]:
    lists = {**ALLOW, "binds": binds}
    one = template(volumes=[mount(source, read_only=True)])
    return [refusal.message for refusal in refusals(one, **lists, real=real)]


@pytest.mark.parametrize(
    ("source", "leads_to"),
    [
        ("/srv/models/link", "/etc"),
        ("/srv/models/link", "/"),
        ("/srv/models/link", "/srv"),
        ("/srv/models/link", "/srv/models2"),
        ("/srv/models/a/b/c", "/home/x/c"),
    ],
)
def test_a_bind_whose_path_leads_out_is_refused_with_both_names(source: str, leads_to: str) -> None:
    assert binds_refused(source, {source: leads_to}) == [
        f"{source!r} leads to {leads_to!r}, which is not in allow.binds; allowed: /srv/models"
    ]


def test_a_bind_is_compared_by_what_both_paths_lead_to() -> None:
    real = {"/srv/models": "/disk1/models", "/srv/models/a": "/disk1/models/a", "/data": "/disk1/models/b"}
    assert binds_refused("/srv/models/a", real) == []
    assert binds_refused("/data", real) == []
    assert binds_refused("/srv/models/unknown", real) != []


def test_a_bind_that_leads_into_a_directory_for_reading_is_not_writable() -> None:
    lists = {**ALLOW, "binds": ("/srv/models", "/srv/scratch:rw")}
    one = template(volumes=[mount("/srv/scratch/link")])
    (refusal,) = refusals(one, **lists, real={"/srv/scratch/link": "/srv/models/a"})
    assert "is allowed for reading only" in refusal.message


@pytest.mark.parametrize(
    ("entry", "opened"),
    [
        ("/", "the whole file system of the host"),
        ("//:rw", "the whole file system of the host"),
        ("/proc", "the host's processes"),
        ("/proc/1", "the host's processes"),
        ("/sys/fs/cgroup:rw", "the host's kernel"),
        ("/dev/shm", "the host's devices"),
        ("/etc", "the host's configuration"),
        ("/etc/", "the host's configuration"),
        ("/var/run/docker.sock", "the engine's socket"),
        ("/var/run", "the sockets of the host's services, the engine's socket"),
        ("/run", "the sockets of the host's services, the engine's socket"),
        ("/run/docker.sock", "the engine's socket"),
        ("/var", "the engine's own files, the sockets of the host's services, the engine's socket"),
        ("/usr:rw", "the host's programs"),
        ("/home", "the daemon's state"),
        ("/home/me/state", "the daemon's state"),
        ("/link", "the whole file system of the host"),
        ("/to-etc", "the host's configuration"),
    ],
)
def test_a_dangerous_entry_says_what_it_opens(entry: str, opened: str) -> None:
    private = {"/var/run/docker.sock": "the engine's socket", "/home/me/state": "the daemon's state"}
    real = {"/var/run/docker.sock": "/run/docker.sock", "/link": "/", "/to-etc": "/etc"}
    assert list(bind_dangers([entry], private=private, real=real)) == [
        f"allow.binds: {entry!r} lets templates mount {opened}"
    ]


@pytest.mark.parametrize(
    "entry",
    [
        "/srv/models",
        "/home/me/models:rw",
        "/usr/share/ollama/.ollama",
        "/var/lib/ollama",
        "/etc/ollama",
        "/data",
    ],
)
def test_a_directory_with_models_is_no_danger(entry: str) -> None:
    private = {"/var/run/docker.sock": "the engine's socket", "/home/me/state": "the daemon's state"}
    assert list(bind_dangers([entry], private=private)) == []


@pytest.mark.parametrize(
    ("written", "read"),
    [("/a/b/", "/a/b"), ("//a//b", "/a/b"), ("/./a/./b", "/a/b"), ("/root/.ollama/", "/root/.ollama")],
)
def test_a_path_has_one_spelling(written: str, read: str) -> None:
    volume = Volume(source=written, target=written)
    assert (volume.source, volume.target) == (read, read)
    assert volume.is_bind


@pytest.mark.parametrize(
    "image",
    [
        "ollama/ollama:0.32.15",
        "ollama/ollama:0.32.15@" + DIGEST,
        "registry.example:5000/team/ollama:1",
    ],
)
def test_allowed_images_pass(image: str) -> None:
    assert refused(template(image=image)) == []


@pytest.mark.parametrize(
    "image",
    [
        "ollama/ollama@" + DIGEST,
        "evil/ollama:1",
        "evil.example/ollama/ollama:1",
        "ollama/ollama2:1",
        "registry.example:5000/team/sub/ollama:1",
        "registry.example:5000/other/ollama:1",
        "registry.example/team/ollama:1",
    ],
)
def test_other_images_are_refused_by_name(image: str) -> None:
    allowed = "ollama/ollama:*, registry.example:5000/team/*:*"
    assert refused(template(image=image)) == [
        ("image", f"{image!r} is not in allow.images; allowed: {allowed}")
    ]


def test_an_image_without_a_tag_means_latest() -> None:
    assert refused(template(image="ollama/ollama"), images=("ollama/ollama:latest",)) == []
    assert refused(template(image="ollama/ollama"), images=("ollama/ollama:1",)) != []


def test_a_star_does_not_reach_into_another_registry() -> None:
    assert refused(template(image="ollama:5000/evil/image:1"), images=("ollama:*",)) != []


def test_an_empty_list_allows_nothing() -> None:
    assert refused(template(), images=()) == [
        ("image", "'ollama/ollama:1' is not in allow.images; allowed: nothing")
    ]


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"network": "bridge"}, "network", "'bridge' is not in allow.networks"),
        ({"env": {"LD_PRELOAD": "x"}}, "env.LD_PRELOAD", "'LD_PRELOAD' is not in allow.env"),
        ({"env": {"ollama_x": "x"}}, "env.ollama_x", "is not in allow.env"),
        (
            {"env": {"CUDA_VISIBLE_DEVICES": "0"}},
            "env.CUDA_VISIBLE_DEVICES",
            "'0' contradicts device: cpu, which sets CUDA_VISIBLE_DEVICES=-1",
        ),
        (
            {"env": {"OLLAMA_LLM_LIBRARY": "cuda"}},
            "env.OLLAMA_LLM_LIBRARY",
            "contradicts device: cpu",
        ),
        (
            {"device": "gpu", "env": {"CUDA_VISIBLE_DEVICES": "-1"}},
            "env.CUDA_VISIBLE_DEVICES",
            "decided by the instance's device",
        ),
        (
            {"device": "gpu", "env": {"NVIDIA_VISIBLE_DEVICES": "all"}},
            "env.NVIDIA_VISIBLE_DEVICES",
            "decided by the instance's device",
        ),
        ({"limits": {"vram": "4g"}}, "limits.vram", "a template for the CPU needs no GPU memory"),
        ({"volumes": [mount("other")]}, "volumes.0.source", "'other' is not in allow.volumes"),
        ({"volumes": [mount("/etc", read_only=True)]}, "volumes.0.source", "is not in allow.binds"),
        (
            {"volumes": [mount("/srv/models2", read_only=True)]},
            "volumes.0.source",
            "is not in allow.binds",
        ),
        ({"volumes": [mount("/srv", read_only=True)]}, "volumes.0.source", "is not in allow.binds"),
        (
            {"volumes": [mount("/srv/models/a")]},
            "volumes.0.source",
            "'/srv/models/a' is allowed for reading only: set read_only: true",
        ),
        (
            {"volumes": [mount("team-a"), mount("team-b", "/models/")]},
            "volumes.1.target",
            "'/models' is mounted twice",
        ),
    ],
)
def test_the_allow_lists_refuse(values: dict[str, Any], key: str, message: str) -> None:
    ((where, why),) = refused(template(**values))
    assert where == key
    assert message in why


@pytest.mark.parametrize(
    "values",
    [
        {"env": CPU_ONLY_ENVIRONMENT},
        {"device": "gpu", "env": {"OLLAMA_SCHED_SPREAD": "0"}, "limits": {"vram": "4g"}},
        {"volumes": [mount("ollama-models", "/a"), mount("team-x", "/b")]},
        {
            "volumes": [
                mount("/srv/models", read_only=True),
                mount("/srv/models/deep/er", "/x", read_only=True),
            ]
        },
        {"volumes": [mount("/srv/scratch"), mount("/srv/scratch/a", "/x", read_only=True)]},
    ],
)
def test_what_is_allowed_passes(values: dict[str, Any]) -> None:
    assert refused(template(**values)) == []


def test_everything_that_is_refused_is_said_at_once() -> None:
    one = template(
        image="evil/image:1",
        network="other",
        env={"PATH": "/x"},
        volumes=[mount("other"), mount("/etc", "/x", read_only=True)],
        limits={"vram": "1g"},
    )
    assert [key for key, _ in refused(one)] == [
        "image",
        "network",
        "env.PATH",
        "volumes.0.source",
        "volumes.1.source",
        "limits.vram",
    ]


# Pieces that are allowed, nearly allowed and dangerous, and any way of gluing them together.
_PIECES = st.sampled_from(
    [
        *(
            "ollama/ollama",
            "ollama",
            "evil",
            ":1",
            ":",
            "/",
            "@",
            DIGEST,
            "registry.example:5000",
            "team",
            "-",
        ),
        *(
            "OLLAMA_",
            "CUDA_VISIBLE_DEVICES",
            "NVIDIA_VISIBLE_DEVICES",
            "LD_PRELOAD",
            "=",
            " ",
            "\n",
            "\0",
            "*",
        ),
        *(
            "ollama-manager",
            "ollama-models",
            "host",
            "container:",
            "none",
            "/srv/models",
            "/srv/scratch",
            "/etc",
        ),
        *(
            "..",
            "/..",
            "/.",
            "//",
            ":rw",
            "/dev/dri",
            "/proc",
            "/var/run/docker.sock",
            "[a-z]",
            "?",
            "0",
            "-1",
        ),
    ]
)
_WORDS = st.one_of(st.text(max_size=12), st.lists(_PIECES, min_size=1, max_size=4).map("".join))


def _mostly(*allowed: str) -> st.SearchStrategy[str]:
    """Something allowed, more often than not: one wrong thing in a good template is the interesting case."""
    return st.integers(0, 5).flatmap(lambda n: _WORDS if n == 0 else st.sampled_from(allowed))


_VOLUMES = st.fixed_dictionaries(
    {
        "source": _mostly("ollama-models", "team-a", "/srv/models", "/srv/models/./a/", "//srv/scratch"),
        "target": _mostly("/root/.ollama", "/root/.ollama/", "/tmp", "/models", "//models//"),
    },
    optional={"read_only": st.booleans()},
)
_ALLOWED_KEYS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "image": _mostly("ollama/ollama:1", "registry.example:5000/team/ollama:1"),
        "device": st.sampled_from(["cpu", "gpu"]),
    },
    optional={
        "env": st.dictionaries(
            _mostly("OLLAMA_X", "OLLAMA_LLM_LIBRARY", "CUDA_VISIBLE_DEVICES"),
            st.one_of(st.integers(), st.booleans(), _mostly("cpu", "-1", "x")),
            max_size=2,
        ),
        "network": _mostly("ollama-manager"),
        "volumes": st.lists(_VOLUMES, max_size=2),
    },
)
_FURTHER_KEYS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, {}, {}, {"privileged": True}, {"command": "sh"}]
)
_TEMPLATES = st.tuples(_ALLOWED_KEYS, _FURTHER_KEYS).map(lambda both: both[0] | both[1])


@settings(max_examples=500)
@given(values=_TEMPLATES)
def test_no_template_can_ask_for_anything_outside_the_allow_lists(values: dict[str, Any]) -> None:
    try:
        one = Template.model_validate(values)
    except ValidationError:
        return
    if refused(one):
        return
    assert not {"privileged", "command"} & set(values)
    gpu = "GPU-1" if one.device is DeviceKind.GPU else None
    asked = container_request(one, manager_id="m", instance_id="i", gpu=gpu, loopback_port=None)

    assert re.fullmatch(
        r"ollama/ollama(:[\w.-]+(@sha256:\w{64})?)?|registry\.example:5000/team/[^/:@]+(:[\w.-]+)?(@sha256:\w{64})?",
        asked.image,
    )
    assert asked.network == "ollama-manager"
    for name, value in asked.env.items():
        assert name.startswith("OLLAMA_") or name in ALLOW["env"]
        assert "=" not in name
        assert "\0" not in name + value
    if gpu is None:
        assert asked.env.items() >= CPU_ONLY_ENVIRONMENT.items()
        assert (asked.gpu, asked.runtime) == (None, "runc")
    else:
        assert asked.env["NVIDIA_VISIBLE_DEVICES"] == gpu
        assert "CUDA_VISIBLE_DEVICES" not in asked.env
    for one_mount in asked.mounts:
        path = PurePosixPath(one_mount.source)
        assert ":" not in one_mount.source + one_mount.target
        assert ".." not in path.parts
        if one_mount.bind:
            assert path.is_relative_to("/srv/models") or path.is_relative_to("/srv/scratch")
            assert one_mount.read_only or path.is_relative_to("/srv/scratch")
        else:
            assert one_mount.source == "ollama-models" or one_mount.source.startswith("team-")
        assert PurePosixPath(one_mount.target).parts[1] not in {"dev", "proc", "sys"}
    targets = [one_mount.target for one_mount in asked.mounts]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & set(asked.tmpfs)


@pytest.mark.parametrize(("size", "is_enough"), [("6m", True), (6 * 2**20 - 1, False)])
def test_memory_is_limited_to_what_an_engine_accepts_at_least(size: str | int, *, is_enough: bool) -> None:
    values = {"image": "x", "device": "cpu", "limits": {"memory": size}}
    if is_enough:
        assert Template.model_validate(values).limits.memory == 6 * 2**20
    else:
        with pytest.raises(ValidationError, match="expected 6m or more"):
            Template.model_validate(values)
