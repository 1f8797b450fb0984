"""The command line. Importing it is cheap: each command imports what it needs when it runs."""

from manager.cli import collection_backfills, collection_items  # noqa: F401  (they add their commands)
from manager.cli import requests as _requests  # noqa: F401
from manager.cli.benchmark import benchmark_group
from manager.cli.budgets import budgets_command
from manager.cli.classifier import classifier_group
from manager.cli.collections import collections_group
from manager.cli.commands import main, program
from manager.cli.container_logs import logs_command
from manager.cli.events import events_command
from manager.cli.gpus import gpus_command
from manager.cli.keys import keys_group
from manager.cli.lanes import lanes_command
from manager.cli.local_only import local_only_command
from manager.cli.model_list import models_command
from manager.cli.roles import roles_group
from manager.cli.rollout import rollout_group
from manager.cli.runs import runs_group
from manager.cli.schedules import schedules_command
from manager.cli.tiers import tiers_group
from manager.cli.top import top_command
from manager.cli.usage import usage_command

for _command in (
    logs_command,
    events_command,
    gpus_command,
    models_command,
    roles_group,
    tiers_group,
    lanes_command,
    runs_group,
    classifier_group,
    collections_group,
    benchmark_group,
    schedules_command,
    rollout_group,
    local_only_command,
    keys_group,
    budgets_command,
    usage_command,
    top_command,
):
    program.add_command(_command)

__all__ = ["main"]
