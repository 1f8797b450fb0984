"""Volumes are read through a container that is never started."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER, LABEL_READER
from manager.domain.instance import DeviceKind, Driver, InstanceSpec, Limits
from manager.domain.template import Template
from manager.errors import (
    ArchiveTooLargeError,
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    Reason,
)
from manager.services.models import volume_reader
from manager.services.models.model_lists import ModelLists
from manager.services.models.volume_reader import VolumeReader
from manager.services.ports import Archive
from manager.wire import model_store
from manager.wire.model_store import digest_of
from tests.support.attempts import Clock, Journal
from tests.support.fleet_rig import until
from tests.unit.wire.test_model_store import CONFIG, HEX, LIST, MODEL, archive, layer, raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.domain.container import ContainerRequest

LIMITS = Limits(900, 300, 30, 60, 2, 15, 20)
STORE = "/root/.ollama/models"
LIBRARY = "manifests/registry.ollama.ai/library"
MTIME = "2026-11-21T08:00:05.374443553Z"


def config_of(number: int) -> str:
    return f"{number:064x}"


def manifest(number: int = 1) -> bytes:
    config = {"digest": f"sha256:{config_of(number)}", "size": 100}
    return raw({"config": config, "layers": [layer(MODEL, 900)]})


class Engine:
    """An engine with these files in its volumes. `errors` are what it answers calls with."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | str] = {}
        self.images = {"ollama/ollama:1", "ollama/ollama:2"}
        self.volumes = {"models", "other"}
        self.left: list[str] = []
        self.there: dict[str, ContainerRequest] = {}
        self.made: list[ContainerRequest] = []
        self.calls: list[str] = []
        self.errors: dict[str, EngineError] = {}
        self.hangs: asyncio.Event | None = None
        self.reached = asyncio.Event()

    def has(self, *names: str, config: bytes | None = None) -> None:
        for name in names:
            model, _, tag = name.partition(":")
            self.files[f"{LIBRARY}/{model}/{tag or 'latest'}"] = manifest()
        self.files[f"blobs/sha256-{config_of(1)}"] = raw(CONFIG) if config is None else config

    async def list_containers(self, manager_id: str, *, label: str) -> tuple[Any, ...]:
        self._called(f"list {label}={manager_id}")
        return tuple(SimpleNamespace(id=id_) for id_ in self.left)

    async def has_volume(self, name: str) -> bool:
        self._called(f"volume {name}")
        return name in self.volumes

    async def create(self, request: ContainerRequest) -> str:
        self._called("create")
        if request.image not in self.images:
            raise EngineError(f"No such image: {request.image}", reason=Reason.IMAGE_MISSING)
        self.made.append(request)
        self.there[request.name] = request
        return "id"

    async def remove(self, name: str) -> None:
        self._called(f"remove {name}")
        self.there.pop(name, None)
        self.left = [id_ for id_ in self.left if id_ != name]

    async def read_archive(self, container: str, path: str, most_bytes: int) -> Archive | None:
        self._called(f"read {path}")
        self.reached.set()
        if self.hangs is not None:
            await self.hangs.wait()
        if container not in self.there:
            raise ContainerGoneError("No such container")
        (mount,) = self.there[container].mounts
        assert mount.read_only
        below = path.removeprefix(f"{STORE}/")
        if below in self.files:
            found = {below.rpartition("/")[2]: self.files[below]}
        else:
            found = {name: file for name, file in self.files.items() if name.startswith(f"{below}/")}
        if not found:
            return None
        tar = archive(*found.items())
        if len(tar) > most_bytes:
            raise ArchiveTooLargeError(f"{path} has more than {most_bytes} bytes")
        return Archive(tar, base64.b64encode(json.dumps({"mtime": MTIME}).encode()).decode())

    def reads(self) -> list[str]:
        return [call.removeprefix(f"read {STORE}/") for call in self.calls if call.startswith("read")]

    def _called(self, call: str) -> None:
        self.calls.append(call)
        for beginning, error in self.errors.items():
            if call.startswith(beginning):
                raise error


class Registry:
    def __init__(self) -> None:
        self.saved: list[tuple[str, int]] = []

    async def save_model_list(self, volume: str, entries: tuple[Any, ...]) -> None:
        self.saved.append((volume, len(entries)))


class Rig:
    """A reader over instances, by default one on the volume `models`."""

    def __init__(self, *instances: Any, up: bool = True) -> None:
        self.engine = Engine()
        self.journal = Journal()
        self.clock = Clock()
        self.registry = Registry()
        self.lists = ModelLists(cast("Any", self.registry), cast("Any", self.journal), {})
        self.members = list(instances or [instance("one")])
        self.watch = SimpleNamespace(up=up, came_up=asyncio.Event())
        if up:
            self.watch.came_up.set()
        self.waited: list[float] = []
        fleet = SimpleNamespace(instances=lambda: self.members)
        self.reader = VolumeReader(
            cast("Any", fleet),
            cast("Any", self.watch),
            cast("Any", SimpleNamespace(known=self._known)),
            cast("Any", self.engine),
            self.lists,
            journal=cast("Any", self.journal),
            manager_id="m",
            now=self.clock,
        )

    async def _known(self, *, within_s: float) -> None:
        self.waited.append(within_s)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        running = asyncio.ensure_future(self.reader.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def look(self, volume: str | None = None, within_s: float = 20.0) -> list[str] | None:
        await self.reader.look(within_s=within_s, volume=volume)
        return self.names(volume or "models")

    def names(self, volume: str = "models") -> list[str] | None:
        found = self.lists.of(volume)
        return None if found is None else sorted(found.values())


def instance(
    name: str,
    source: str = "models",
    *,
    image: str = "ollama/ollama:1",
    target: str = "/root/.ollama",
    running: bool = False,
    env: dict[str, str] | None = None,
) -> Any:
    template = Template.model_validate(
        {
            "image": image,
            "device": "cpu",
            "env": env or {},
            "volumes": [{"source": source, "target": target}] if source else [],
        }
    )
    spec = InstanceSpec(name, Driver.DOCKER, DeviceKind.CPU, LIMITS, template=template)
    return SimpleNamespace(id=name, spec=spec, usable_endpoint=lambda: "http://x" if running else None)


# --- what is read ---------------------------------------------------------------------------------


async def test_a_volume_that_was_never_listed_is_read_when_the_engine_is_there_and_nothing_is_started() -> (
    None
):
    rig = Rig(instance("one"), instance("two"))
    rig.engine.has("tiny", "qwen3:8b")
    async with rig.running():
        assert await rig.look() == ["qwen3:8b", "tiny:latest"]
    (request,) = rig.engine.made
    assert request.labels == {LABEL_READER: "m"}
    assert not {LABEL_MANAGER, LABEL_INSTANCE} & set(request.labels)
    assert (request.network, request.gpu, request.loopback_port) == ("none", None, None)
    assert [(mount.source, mount.read_only) for mount in request.mounts] == [("models", True)]
    assert rig.engine.there == {}
    assert rig.journal.kinds == ["volume_read"]
    assert rig.journal.details == ["models: 2 models"]


async def test_only_manifests_and_config_blobs_are_read() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.files[f"blobs/sha256-{HEX}"] = b"the weights"
    async with rig.running():
        await rig.look()
    config = f"blobs/sha256-{config_of(1)}"
    assert rig.engine.reads() == ["manifests-v2", "manifests", f"{LIBRARY}/tiny/latest", config]


async def test_the_entries_are_those_of_a_server() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    async with rig.running():
        await rig.look()
    entry = rig.lists.entries("models")["tiny:latest"]
    assert entry["digest"] == digest_of(manifest())
    assert (entry["size"], entry["modified_at"]) == (1000, MTIME)
    assert entry["details"]["parameter_size"] == "344K"


async def test_the_newest_model_is_listed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.engine.has("old", "new", "older")
    manifest_files = model_store.manifest_files
    ages = {"old:latest": "2026-02-01", "new:latest": "2026-03-01", "older:latest": "2026-01-01"}

    def aged(tar: bytes, folder: str) -> list[model_store.ManifestFile]:
        return [
            replace(file, modified_at=f"{ages[file.name]}T00:00:00Z") for file in manifest_files(tar, folder)
        ]

    monkeypatch.setattr(model_store, "manifest_files", aged)
    async with rig.running():
        await rig.look()
    assert list(rig.lists.entries("models")) == ["new:latest", "old:latest", "older:latest"]


async def test_a_time_without_its_fraction_is_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.engine.has("tiny")
    monkeypatch.setattr(model_store, "modified_at", lambda _stat: None)
    async with rig.running():
        await rig.look()
    assert rig.lists.entries("models")["tiny:latest"]["modified_at"] == "2026-11-28T08:59:12Z"


@pytest.mark.parametrize(
    ("env", "target", "directory"),
    [
        ({}, "/root/.ollama/models", "/root/.ollama/models"),
        ({"OLLAMA_MODELS": "/data/models/"}, "/data", "/data/models"),
        ({"OLLAMA_MODELS": "/data"}, "/data", "/data"),
    ],
)
async def test_the_store_is_where_the_template_has_it(
    env: dict[str, str], target: str, directory: str
) -> None:
    rig = Rig(instance("one", target=target, env=env))
    async with rig.running():
        await rig.look()
    assert rig.engine.calls.count(f"read {directory}/manifests") == 1


async def test_newer_stores_have_links_and_count_first() -> None:
    rig = Rig()
    rig.engine.has("tiny", "old")
    new = manifest(2)
    rig.engine.files["manifests-v2/registry.ollama.ai/library/Tiny/latest"] = (
        f"../../../../blobs/sha256-{HEX}"
    )
    rig.engine.files[f"blobs/sha256-{HEX}"] = new
    rig.engine.files[f"blobs/sha256-{config_of(2)}"] = raw({**CONFIG, "model_type": "8B"})
    async with rig.running():
        assert await rig.look() == ["Tiny:latest", "old:latest"]
    entry = rig.lists.entries("models")["tiny:latest"]
    assert (entry["details"]["parameter_size"], entry["digest"]) == ("8B", digest_of(new))


async def test_a_list_of_manifests_leads_to_the_one_that_runs_here() -> None:
    rig = Rig()
    rig.engine.has("tiny", "lost")
    child = {"runner": "ollama", "digest": f"sha256:{HEX}"}
    path = f"{LIBRARY}/multi/latest"
    rig.engine.files[path] = raw({"mediaType": LIST, "manifests": [child]})
    rig.engine.files[f"blobs/sha256-{HEX}"] = manifest()
    rig.engine.files[f"{LIBRARY}/lost/latest"] = raw(
        {"mediaType": LIST, "manifests": [{"runner": "ollama", "digest": f"sha256:{'e' * 64}"}]}
    )
    async with rig.running():
        assert await rig.look() == ["multi:latest", "tiny:latest"]
    entry = rig.lists.entries("models")["multi:latest"]
    assert (entry["size"], entry["digest"]) == (1000, digest_of(cast("bytes", rig.engine.files[path])))


# --- what is wrong with it ------------------------------------------------------------------------


async def test_a_corrupt_model_is_left_out_and_the_others_are_listed() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.files |= {
        f"{LIBRARY}/corrupt/latest": b"{",
        f"{LIBRARY}/configless/latest": manifest(2),
        f"{LIBRARY}/badconfig/latest": manifest(3),
        f"blobs/sha256-{config_of(3)}": b"nonsense",
        f"{LIBRARY}/noconfig/latest": raw({"layers": []}),
    }
    async with rig.running():
        assert await rig.look() == ["noconfig:latest", "tiny:latest"]


async def test_a_config_blob_of_gigabytes_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_reader, "_MAX_CONFIG_BYTES", 20_000)
    rig = Rig()
    rig.engine.has("tiny", config=b"0" * 30_000)
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]
    entry = rig.lists.entries("models")["tiny:latest"]
    assert (entry["size"], entry["details"]["family"]) == (1000, "")


async def test_a_store_out_of_bounds_is_no_list_and_an_event_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_reader, "_MAX_MANIFESTS_BYTES", 20_000)
    rig = Rig()
    rig.engine.has(*(f"m{number}" for number in range(100)))
    async with rig.running():
        assert await rig.look() is None
    assert rig.journal.kinds == ["volume_not_read"]
    assert "20000 bytes" in rig.journal.details[0]
    monkeypatch.setattr(volume_reader, "_MAX_MANIFESTS_BYTES", 10**9)
    monkeypatch.setattr(model_store, "MAX_MODELS", 99)
    rig.clock.advance(60)
    async with rig.running():
        assert await rig.look() is None
    assert "more than 99 models" in rig.journal.details[1]
    assert rig.engine.there == {}


async def test_of_very_many_models_the_newest_have_details(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_reader, "_MAX_DETAILED", 1)
    rig = Rig()
    rig.engine.has("a", "b")
    async with rig.running():
        assert await rig.look() == ["a:latest", "b:latest"]
    families = [entry["details"]["family"] for entry in rig.lists.entries("models").values()]
    assert sorted(families) == ["", "llama"]


async def test_a_volume_without_a_store_counts_as_never_read() -> None:
    rig = Rig()
    async with rig.running():
        assert await rig.look() is None
    assert rig.engine.there == {}
    assert rig.journal.kinds == []


async def test_a_volume_that_does_not_exist_is_not_made_by_looking() -> None:
    rig = Rig(instance("one", "nothing"), instance("host", "/srv/models"))
    async with rig.running():
        await rig.look("nothing")
        await rig.look("/srv/models")
    assert [request.mounts[0].source for request in rig.engine.made] == ["/srv/models"]
    assert rig.engine.made[0].mounts[0].bind
    assert "volume /srv/models" not in rig.engine.calls


async def test_what_has_no_volume_is_not_read() -> None:
    external = SimpleNamespace(
        id="nas",
        spec=InstanceSpec("nas", Driver.EXTERNAL, None, LIMITS, url="http://x"),
        usable_endpoint=lambda: None,
    )
    rig = Rig(external, instance("alone", ""), instance("cache", target="/var/cache/x"))
    async with rig.running():
        await rig.look()
    assert [call for call in rig.engine.calls if not call.startswith("list")] == []


async def test_a_volume_whose_server_runs_is_listed_by_that() -> None:
    rig = Rig(instance("one"), instance("two", running=True))
    async with rig.running():
        await rig.look()
    assert rig.engine.made == []


# --- images and engines that are not there --------------------------------------------------------


async def test_another_image_on_the_volume_does_as_well() -> None:
    rig = Rig(instance("one"), instance("same"), instance("two", image="ollama/ollama:2"))
    rig.engine.images = {"ollama/ollama:2"}
    rig.engine.has("tiny")
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]
    assert rig.engine.calls.count("create") == 2


async def test_without_an_image_the_volume_is_tried_again_later_and_told_once() -> None:
    rig = Rig()
    rig.engine.images = set()
    rig.engine.has("tiny")
    async with rig.running():
        assert await rig.look() is None
        rig.engine.images = {"ollama/ollama:1"}
        assert await rig.look() is None, "not at once"
        rig.clock.advance(31)
        assert await rig.look() == ["tiny:latest"]
    assert rig.journal.events == [
        ("volume_not_read", None, Reason.IMAGE_MISSING),
        ("volume_read", None, None),
    ]


async def test_the_same_trouble_is_told_once() -> None:
    rig = Rig()
    rig.engine.errors["create"] = EngineError("bind source path does not exist", reason=Reason.START_FAILED)
    async with rig.running():
        for _ in range(3):
            await rig.look()
            rig.clock.advance(31)
    assert rig.journal.kinds == ["volume_not_read"]
    assert rig.engine.calls.count("create") == 3


@pytest.mark.parametrize("at", ["volume", "create", "read", f"read {STORE}/blobs"])
async def test_an_engine_that_goes_away_half_way_leaves_the_reader_usable(at: str) -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.errors[at] = EngineUnreachableError("gone")
    async with rig.running():
        await rig.look()
        assert rig.journal.kinds[-1] == "volume_not_read"
        del rig.engine.errors[at]
        rig.lists = ModelLists(cast("Any", rig.registry), cast("Any", rig.journal), {})
        rig.reader._lists = rig.lists
        rig.clock.advance(31)
        assert await rig.look() == ["tiny:latest"]


async def test_names_that_came_before_the_details_failed_are_kept_but_not_stored() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.errors[f"read {STORE}/blobs"] = EngineUnreachableError("gone")
    storing = asyncio.ensure_future(rig.lists.run())
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]
    await asyncio.sleep(0)
    assert rig.registry.saved == []
    rig.lists.read("models", tuple(rig.lists.entries("models").values()), rig.clock.advance(1))
    while not rig.registry.saved:  # noqa: ASYNC110  (there is no event to wait for)
        await asyncio.sleep(0)
    assert rig.registry.saved == [("models", 1)], "a server says the same: that is stored"
    storing.cancel()


async def test_details_that_failed_are_read_later_and_then_stored() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.errors[f"read {STORE}/blobs"] = EngineUnreachableError("gone")
    storing = asyncio.ensure_future(rig.lists.run())
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]
        assert rig.journal.details == ["models: only the names were read: gone"]
        rig.engine.errors.clear()
        await rig.look()
        assert rig.engine.calls.count("create") == 1, "not at once"
        rig.clock.advance(31)
        await rig.look("other")
        assert rig.engine.calls.count("create") == 1, "nobody asked for this volume"
        await rig.look()
        await until(lambda: rig.registry.saved == [("models", 1)])
        assert rig.lists.entries("models")["tiny:latest"]["details"]["parameter_size"] == "344K"
        rig.clock.advance(31)
        await rig.look()
        assert rig.engine.calls.count("create") == 2, "all is known"
    storing.cancel()


async def test_nobody_waits_for_details() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.errors[f"read {STORE}/blobs"] = EngineUnreachableError("gone")
    async with rig.running():
        await rig.look()
        rig.engine.errors.clear()
        rig.engine.hangs = asyncio.Event()
        rig.clock.advance(31)
        async with asyncio.timeout(5):
            assert await rig.look(within_s=60) == ["tiny:latest"]


async def test_details_are_not_read_any_more_once_a_server_lists_the_volume() -> None:
    one = instance("one")
    rig = Rig(one)
    rig.engine.has("tiny")
    rig.engine.errors[f"read {STORE}/blobs"] = EngineUnreachableError("gone")
    async with rig.running():
        await rig.look()
        rig.engine.errors.clear()
        one.usable_endpoint = lambda: "http://x"
        for _ in range(2):
            rig.clock.advance(31)
            await rig.look()
            await asyncio.sleep(0)
        one.usable_endpoint = lambda: None
        rig.clock.advance(31)
        await rig.look()
    assert rig.engine.calls.count("create") == 1


async def test_a_server_s_list_that_came_meanwhile_is_newer() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.hangs = asyncio.Event()
    async with rig.running():
        looking = asyncio.ensure_future(rig.look())
        await rig.engine.reached.wait()
        rig.lists.read("models", ({"name": "fresh:latest"},), rig.clock.advance(0.1))
        rig.engine.hangs.set()
        assert await looking == ["fresh:latest"]


async def test_nobody_waits_for_an_engine_that_is_down_and_its_return_begins_the_reading() -> None:
    rig = Rig(up=False)
    rig.engine.has("tiny")
    async with rig.running():
        assert await rig.look() is None
        assert rig.waited == [20.0]
        assert rig.engine.calls == []
        rig.watch.up = True
        rig.watch.came_up.set()
        assert await rig.look() == ["tiny:latest"]


async def test_a_wait_has_an_end_and_the_reading_goes_on() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.hangs = asyncio.Event()
    async with rig.running():
        assert await rig.look(within_s=0.01) is None
        rig.engine.hangs.set()
        assert await rig.look() == ["tiny:latest"]
    assert rig.engine.calls.count("create") == 1, "one reading for all who wait"


async def test_one_volume_can_be_waited_for_alone() -> None:
    rig = Rig(instance("one"), instance("two", "other"))
    rig.engine.has("tiny")
    async with rig.running():
        assert await rig.look("other") == ["tiny:latest"]


# --- containers that are left ---------------------------------------------------------------------


async def test_containers_of_a_killed_daemon_are_removed_first() -> None:
    rig = Rig()
    rig.engine.left = ["left-1", "left-2"]
    async with rig.running():
        await rig.look()
    assert rig.engine.calls[:3] == [f"list {LABEL_READER}=m", "remove left-1", "remove left-2"]


async def test_what_cannot_be_removed_keeps_nobody_from_reading() -> None:
    rig = Rig()
    rig.engine.left = ["left"]
    rig.engine.has("tiny")
    rig.engine.errors["remove left"] = EngineError("busy", reason=Reason.START_FAILED)
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]


async def test_a_container_that_cannot_be_removed_spoils_no_reading_and_is_removed_later() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.errors["remove"] = EngineError("busy", reason=Reason.START_FAILED)
    async with rig.running():
        assert await rig.look() == ["tiny:latest"]
        assert (rig.journal.kinds, rig.journal.details) == (["volume_read"], ["models: 1 models"])
        rig.engine.left = list(rig.engine.there)
        assert len(rig.engine.left) == 1
        rig.engine.errors.clear()
        rig.lists = ModelLists(cast("Any", rig.registry), cast("Any", rig.journal), {})
        rig.reader._lists = rig.lists
        rig.clock.advance(31)
        assert await rig.look() == ["tiny:latest"]
        assert (rig.engine.there, rig.engine.left) == ({}, [])


async def test_a_reading_that_failed_is_told_with_its_own_reason_when_the_removal_fails_too() -> None:
    rig = Rig()
    rig.engine.errors["read"] = EngineError("the disk is bad", reason=Reason.START_FAILED)
    rig.engine.errors["remove"] = EngineError("busy", reason=Reason.START_FAILED)
    async with rig.running():
        assert await rig.look() is None
    assert rig.journal.details == ["models: the disk is bad"]


async def test_a_daemon_that_ends_while_it_reads_leaves_no_container() -> None:
    rig = Rig()
    rig.engine.has("tiny")
    rig.engine.hangs = asyncio.Event()
    async with rig.running():
        await rig.engine.reached.wait()
        assert len(rig.engine.there) == 1
    assert rig.engine.there == {}
