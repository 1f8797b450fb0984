"""The only reader of the environment and of configuration files."""

from manager.settings.fallback_overrides import written_fallback
from manager.settings.load import LoadedSettings, key_weaknesses, load_settings, read_keys
from manager.settings.model import InstanceSettings, ScheduleSettings, Settings
from manager.settings.overrides import written_roles
from manager.settings.rollout import written_rollout
from manager.settings.routing import (
    GatewaySettings,
    ModelsSettings,
    RoleSettings,
    routing_settings,
)
from manager.settings.templates import (
    auto_gpu_spec,
    load_templates,
    missing_binds,
    node_spec,
    packaged_templates,
    real_writers,
    resolve_instances,
    template_warnings,
)

__all__ = [
    "GatewaySettings",
    "InstanceSettings",
    "LoadedSettings",
    "ModelsSettings",
    "RoleSettings",
    "ScheduleSettings",
    "Settings",
    "auto_gpu_spec",
    "key_weaknesses",
    "load_settings",
    "load_templates",
    "missing_binds",
    "node_spec",
    "packaged_templates",
    "read_keys",
    "real_writers",
    "resolve_instances",
    "routing_settings",
    "template_warnings",
    "written_fallback",
    "written_roles",
    "written_rollout",
]
