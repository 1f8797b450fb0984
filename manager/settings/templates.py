"""Container templates from their files, and the instances that are made of them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from manager.domain.container import container_name
from manager.domain.gpu import ALL, AUTO
from manager.domain.instance import DeviceKind, Driver, InstanceSpec, KeySource, Limits
from manager.domain.swarm import volume_on_node
from manager.domain.target import Protocol
from manager.domain.template import Template, bind_dangers, refusals
from manager.settings.model import CPU_TEMPLATE, GPU_TEMPLATE, LONGEST_NAME, InstanceSettings
from manager.settings.ownership import weaknesses
from manager.settings.problems import Problem, configuration_error, dotted, from_validation, nearest
from manager.settings.routing import role_refusals
from manager.settings.servers import base_url, kinds_of_cloud, offers_of, price_of
from manager.settings.swarm import template_refusals
from manager.settings.yaml_file import read_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from manager.settings.load import LoadedSettings
    from manager.settings.model import Settings
    from manager.settings.schema import KeyPath

_PACKAGE = Path(__file__).resolve().parents[1]
_LOCAL_ENGINE = "unix://"
_FILE_NAME = re.compile(r"(?P<name>[a-z][a-z0-9-]*)\.ya?ml")


def packaged_templates() -> Path:
    """The templates of an installed wheel, or of the repository the package stands in."""
    inside = _PACKAGE / "packaged_templates"
    return inside if inside.is_dir() else _PACKAGE.parent / "templates"


def load_templates(settings: Settings) -> dict[str, Template]:
    """All templates of the configured directory, by name.

    Raises:
        ConfigurationError: with everything in every file that is not allowed, as FILE:LINE: key.
    """
    directory = settings.templates.dir or packaged_templates()
    try:
        files = sorted(file for file in directory.iterdir() if file.suffix in {".yaml", ".yml"})
    except OSError as error:
        text = f"cannot be read ({error.strerror}); expected a directory with templates"
        raise configuration_error([Problem(str(directory), "templates.dir", text)]) from error
    templates: dict[str, Template] = {}
    problems: list[Problem] = []
    seen: dict[str, Path] = {}
    for file in files:
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            allowed = "expected [a-z][a-z0-9-]*.yaml, because it names the template"
            problems.append(Problem(str(file), "", f"{file.name!r} as a file name; {allowed}"))
            continue
        name = match["name"]
        if name in seen:
            text = f"the template {name!r} is defined by {seen[name].name} already; expected one file a name"
            problems.append(Problem(str(file), "", text))
            continue
        seen[name] = file
        template = _load_template(file, settings, problems)
        if template is not None:
            templates[name] = template
    if problems:
        raise configuration_error(problems)
    return templates


def template_warnings(loaded: LoadedSettings) -> tuple[str, ...]:
    """Dangerous settings that templates are allowed, and others who can change them: a sentence each."""
    settings = loaded.settings
    private: dict[str, str] = {}
    if settings.engine.url.startswith(_LOCAL_ENGINE):
        engine_socket = settings.engine.url.removeprefix(_LOCAL_ENGINE)
        private[engine_socket] = "the engine's socket, which makes a container root on the host"
        private[str(settings.state.dir)] = "the daemon's state"
        private |= {str(file): "the key" for file in settings.server.key_files}
        for name, instance in settings.instances.items():
            if instance.key_file is not None:
                private[str(instance.key_file)] = f"the key for {name}"
        if loaded.file is not None:
            private[str(loaded.file.absolute())] = "the configuration"
    binds = settings.allow.binds
    real = _real(settings, [*(entry.partition(":")[0] for entry in binds), *private])
    found = list(bind_dangers(binds, private=private, real=real))
    if settings.templates.dir is not None:
        for path in (settings.templates.dir, *sorted(settings.templates.dir.glob("*.y*ml"))):
            with suppress(OSError):
                found += (f"{path}: {weakness}" for weakness in weaknesses(path))
    return tuple(found)


def missing_binds(settings: Settings, templates: Mapping[str, Template]) -> tuple[str, ...]:
    """A sentence for each bind of a template whose source does not exist; such a container does not start.

    Nothing is said where the engine is on another machine. A daemon in a container sees other directories
    than the engine: there the sentence may be wrong, and is no error therefore.
    """
    if not settings.engine.url.startswith(_LOCAL_ENGINE):
        return ()
    return tuple(
        f"template {name}: volumes.{index}.source: there is no {volume.source} on this machine; "
        "a container with this mount does not start"
        for name, template in templates.items()
        for index, volume in enumerate(template.volumes)
        if volume.is_bind and _is_missing(Path(volume.source))
    )


def real_writers(settings: Settings) -> dict[str, str]:
    """`models.writers` with volumes as loaded templates name them: a bind by what its path leads to."""
    real = _real(settings, settings.models.writers)
    return {real.get(volume, volume): writer for volume, writer in settings.models.writers.items()}


def resolve_instances(loaded: LoadedSettings, templates: Mapping[str, Template]) -> tuple[InstanceSpec, ...]:
    """Every configured instance with all defaults resolved, in the order of the configuration.

    Raises:
        ConfigurationError: an instance and its template contradict each other, or a role or the writer of a
            volume and the templates of its instance.
    """
    problems: list[Problem] = []
    specs: list[InstanceSpec] = []
    for instance_id, instance in loaded.settings.instances.items():
        template = templates.get(instance.template or "")
        for key, text in _contradictions(instance, template, templates):
            problems.append(loaded.problem(("instances", instance_id, key), text))
        specs.append(_spec(instance_id, instance, template, loaded.settings))
    if not problems:
        problems += (
            loaded.problem(key, text) for key, text in _routing_contradictions(loaded.settings, specs)
        )
    if problems:
        raise configuration_error(problems)
    return tuple(specs)


def auto_gpu_spec(instance_id: str, settings: Settings, templates: Mapping[str, Template]) -> InstanceSpec:
    """The instance of a GPU that `gpus: auto` has found.

    Raises:
        ConfigurationError: there is no template for it.
    """
    template = templates.get(GPU_TEMPLATE)
    if template is None or template.device is not DeviceKind.GPU:
        found = "is missing" if template is None else "has device: cpu"
        text = (
            f"the template {GPU_TEMPLATE!r} {found}, and {instance_id} was found by gpus: auto; "
            f"expected a template of that name with device: gpu, or gpus: none (known: {_known(templates)})"
        )
        directory = settings.templates.dir or packaged_templates()
        raise configuration_error([Problem(str(directory), "gpus", text)])
    return _spec(instance_id, InstanceSettings(template=GPU_TEMPLATE), template, settings)


def node_spec(
    instance_id: str,
    settings: Settings,
    templates: Mapping[str, Template],
    *,
    card: str | None,
    placement: str,
) -> InstanceSpec:
    """Return the instance that a node of a swarm gives: for its CPU, or for one of its cards.

    Raises:
        ConfigurationError: there is no template for it, Swarm cannot run it, or its name is too long.
    """
    name, kind = (CPU_TEMPLATE, DeviceKind.CPU) if card is None else (GPU_TEMPLATE, DeviceKind.GPU)
    template = templates.get(name)
    written = InstanceSettings(
        driver=Driver.SWARM,
        template=name,
        device=None if card is None else (card,),
        placement=(placement,),
    )
    length = len(container_name(settings.manager_id, instance_id))
    if template is None or template.device is not kind:
        problems = [f"expected a template {name!r} with device: {kind.value} (known: {_known(templates)})"]
    else:
        problems = [text for _, text in template_refusals(written, template)]
    if length > LONGEST_NAME:
        problems.append(
            f"its service's name has {length} characters, at most {LONGEST_NAME}: shorten manager_id"
        )
    if problems:
        directory = settings.templates.dir or packaged_templates()
        text = f"{instance_id} was found by swarm.instances: {'; '.join(problems)}"
        raise configuration_error([Problem(str(directory), "swarm.instances", text)])
    return _spec(instance_id, written, template, settings)


def _load_template(file: Path, settings: Settings, problems: list[Problem]) -> Template | None:
    try:
        document = read_document(file, regular=True)
    except OSError as error:
        problems.append(Problem(str(file), "", f"cannot be read ({error.strerror}); expected a YAML file"))
        return None
    problems += document.problems
    if document.data is None:
        return None
    values = _with_spelling(document.data, document.texts)
    template: Template | None
    try:
        template = Template.model_validate(values)
    except ValidationError as error:
        problems += from_validation(error, Template, document.place)
        # What is left without the wrong keys is looked at as well, so that everything is said at once.
        template = _without_wrong_keys(values, error)
        if template is None:
            return None
    allow = settings.allow
    lists = {name: getattr(allow, name) for name in ("images", "env", "networks", "volumes", "binds")}
    sources = [volume.source for volume in template.volumes]
    real = _real(settings, [*sources, *(entry.partition(":")[0] for entry in allow.binds)])
    problems += (
        Problem(document.place(refusal.key), dotted(refusal.key), refusal.message)
        for refusal in refusals(template, **lists, real=real)
    )
    return _with_real_binds(template, real)


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # it may be there: this user cannot tell
    return False


def _real(settings: Settings, paths: Iterable[str]) -> dict[str, str]:
    """The targets of absolute paths of the engine's host; nothing where that host is another one.

    What does not exist from here (the daemon may run in a container) leads to itself.
    """
    if not settings.engine.url.startswith(_LOCAL_ENGINE):
        return {}
    return {path: os.path.realpath(path) for path in paths if path.startswith("/")}


def _with_real_binds(template: Template, real: Mapping[str, str]) -> Template:
    """The template with what its binds lead to: what was checked is what the engine is asked for."""
    volumes = tuple(
        volume.model_copy(update={"source": real.get(volume.source, volume.source)})
        for volume in template.volumes
    )
    return template.model_copy(update={"volumes": volumes})


def _with_spelling(values: dict[str, Any], texts: Mapping[KeyPath, str]) -> dict[str, Any]:
    """A number in `env` as it was written: to a container `1.10` is not 1.1."""
    env = values.get("env")
    if not isinstance(env, dict):
        return values
    spelt = {
        name: texts[("env", name)] if type(value) in {int, float} else value for name, value in env.items()
    }
    return values | {"env": spelt}


def _without_wrong_keys(values: dict[str, Any], error: ValidationError) -> Template | None:
    """The template without its top-level keys that are wrong, if that still is one."""
    wrong = {one["loc"][0] for one in error.errors()}
    try:
        return Template.model_validate({key: value for key, value in values.items() if key not in wrong})
    except ValidationError:
        return None


def _contradictions(
    instance: InstanceSettings, template: Template | None, templates: Mapping[str, Template]
) -> Iterator[tuple[str, str]]:
    if not instance.driver.has_container:
        return
    if template is None:
        hint = nearest(instance.template or "", templates)
        yield "template", f"{instance.template!r} is no template; {hint}known: {_known(templates)}"
    elif template.device is DeviceKind.CPU and instance.device is not None:
        given = instance.device[0] if len(instance.device) == 1 else list(instance.device)
        text = f"{given!r} contradicts the template {instance.template!r}, which has device: cpu"
        yield "device", f"{text}; leave `device` out, or use a template for the GPU"
    elif instance.driver is Driver.SWARM:
        yield from template_refusals(instance, template)


def _routing_contradictions(
    settings: Settings, specs: Sequence[InstanceSpec]
) -> Iterator[tuple[KeyPath, str]]:
    """Check roles and writers by what only templates tell: the device of an instance, and its volumes."""
    kinds = {spec.id: spec.device_kind for spec in specs if not spec.is_paid}
    gpu_of = {id_: None if kind is None else kind is DeviceKind.GPU for id_, kind in kinds.items()}
    slots_of = {spec.id: spec.slots for spec in specs}
    for refusal in role_refusals(settings.roles, gpu_of, slots_of, found=settings.found_ids):
        yield ("roles", *refusal.key), refusal.message
    volumes = {
        spec.id: [
            _volume_key(spec, volume.source) for volume in spec.template.volumes if not volume.read_only
        ]
        for spec in specs
        if spec.template is not None
    }
    real = _real(settings, settings.models.writers)
    for volume, writer in settings.models.writers.items():
        if real.get(volume, volume) not in volumes.get(writer, [real.get(volume, volume)]):
            those = ", ".join(volumes[writer]) or "none"
            yield ("models", "writers", volume), f"{writer!r} cannot write to it; it has: {those}"


def _volume_key(spec: InstanceSpec, source: str) -> str:
    if spec.driver is not Driver.SWARM:
        return source
    return volume_on_node(source, spec.placement, spec.id)


def _spec(
    instance_id: str, instance: InstanceSettings, template: Template | None, settings: Settings
) -> InstanceSpec:
    lifecycle = settings.lifecycle
    own_ttl_s, own_start_timeout_s = instance.ttl_s, instance.start_timeout_s
    limits = Limits(
        ttl_s=lifecycle.ttl_s if own_ttl_s is None else own_ttl_s,
        start_timeout_s=lifecycle.start_timeout_s if own_start_timeout_s is None else own_start_timeout_s,
        stop_timeout_s=lifecycle.stop_timeout_s,
        drain_timeout_s=lifecycle.drain_timeout_s,
        probe_interval_s=lifecycle.probe_interval_s,
        resync_interval_s=lifecycle.resync_interval_s,
        vram_wait_s=lifecycle.vram_wait_s,
    )
    written = instance.device or ()
    kind: DeviceKind | None = None
    device: str | None = None
    devices: tuple[str, ...] = ()
    if template is not None:
        kind = template.device
        if kind is DeviceKind.GPU and (len(written) > 1 or written == (ALL,)):
            devices = written
        elif kind is DeviceKind.GPU:
            device = written[0] if written else AUTO
    elif written and written[0] in set(DeviceKind):
        kind = DeviceKind(written[0])
    protocol = instance.protocol or Protocol.OLLAMA
    is_paid = instance.driver is Driver.CLOUD
    models = instance.models or {}
    serves = frozenset(instance.serves)
    return InstanceSpec(
        id=instance_id,
        driver=instance.driver,
        device_kind=kind,
        limits=limits,
        template=template,
        template_name=instance.template,
        device=device,
        url=None if instance.url is None else base_url(instance.url, protocol),
        pinned=instance.pinned,
        priority=instance.priority,
        prewarm=instance.prewarm,
        serves=serves & kinds_of_cloud(protocol) if is_paid else serves,
        devices=devices,
        slots=instance.slots,
        deny_models=instance.deny_models,
        max_parameters=instance.max_parameters,
        protocol=protocol,
        key=KeySource(instance.key_env, instance.key_file) if instance.key_env or instance.key_file else None,
        prices={name: price_of(one) for name, one in models.items()} if is_paid else {},
        offers=offers_of(models) if is_paid else (),
        model_names=None if is_paid or instance.models is None else tuple(models),
        placement=instance.placement,
    )


def _known(templates: Mapping[str, Template]) -> str:
    return ", ".join(sorted(templates)) or "none"
