"""Every error the program raises on purpose, in one tree. Nothing here knows HTTP.

ManagerError
├── ConfigurationError        the operator wrote something that cannot be used (file, line, key)
├── UnknownInstanceError
├── UnknownModelError         an instance does not have the model
├── UnknownRequestError
├── UnknownPullError
├── UnknownRunError
├── UnknownBenchmarkError
├── UnknownWorkloadError      no such workload for benchmarks
├── UnknownKeyError
├── UnknownGpuError
├── UnknownCollectionError    no such collection, version or item of it
├── NotInstalledError         an optional part of the program is missing
├── InvalidRequestError       well-formed, but not allowed
├── RunsFullError             no further run is taken
├── BenchmarksFullError       no further benchmark is taken
├── ConflictError             the state refuses it
│   ├── CancelledByStopError
│   ├── DrainedError          the instance is out of service by an operator's order
│   ├── LimitReachedError
│   ├── NothingLoadedError    a benchmark names no model, and none is in memory
│   ├── RunStateError         what is asked for does not fit the status of the run
│   ├── LockedError           another process holds the instance
│   ├── NameConflictError     a container that is not ours has our name
│   ├── StateDirHeldError     another daemon holds the state directory
│   ├── ManagerIdHeldError    another daemon serves the manager id
│   ├── ForeignOwnerError     containers of the manager id belong to another state directory
│   ├── ManagerIdChangedError the state directory has containers under its former manager id
│   ├── CollectionConflictError  the state of a collection refuses it
│   ├── EnsembleOffError      the configuration has no ensemble
│   ├── KeyConflictError      the name of a key is taken, or nobody could manage keys any more
│   └── RequestEndedError     it cannot be cancelled any more
├── UnavailableError          something it needs is not there; carries a Reason
│   ├── EngineError           what the container engine answered
│   │   ├── EngineUnreachableError
│   │   │   └── NoDescriptorForEngineError
│   │   ├── ContainerGoneError
│   │   ├── ArchiveTooLargeError
│   │   └── NetworkMissingError
│   ├── AskFailedError        a server did not answer a request
│   ├── StartFailedError
│   │   └── BackingOffError   it is too soon after an earlier failure
│   ├── NotAnsweredError      no server has answered a request that the daemon makes itself
│   │   └── NotEmbeddedError  no server has embedded the texts of a collection
│   ├── OutOfDescriptorsError     the process itself lacks descriptors; no server is at fault
│   ├── RegistryUnwritableError
│   ├── VectorsUnavailableError   the tables of vectors could not be read or written
│   │   └── VectorsDamagedError   one of them is missing or unreadable
│   └── RunFilesError         a file of a run could not be read or written
├── GpuQueryError             NVML did not answer, or said no
└── RegistryCorruptError
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Reason(StrEnum):
    """Reasons why something is not as it was asked for. One list for the API, logs, metrics and headers."""

    INSTANCE_STOPPED = "instance_stopped"
    INSTANCE_UNAVAILABLE = "instance_unavailable"
    INSTANCE_UNHEALTHY = "instance_unhealthy"
    GPU_MISSING = "gpu_missing"
    START_FAILED = "start_failed"
    START_TIMEOUT = "start_timeout"
    VRAM_INSUFFICIENT = "vram_insufficient"
    MODEL_MISSING = "model_missing"
    MODEL_LOAD_FAILED = "model_load_failed"
    ATTEMPT_TIMEOUT = "attempt_timeout"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_ERROR = "upstream_error"
    INVALID_OUTPUT = "invalid_output"
    BREAKER_OPEN = "breaker_open"
    QUEUE_FULL = "queue_full"
    OVERLOADED = "overloaded"
    HOST_DENIED = "host_denied"
    BUDGET_EXHAUSTED = "budget_exhausted"
    LOCAL_ONLY = "local_only"
    POLICY = "policy"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    IMAGE_MISSING = "image_missing"
    NAME_CONFLICT = "name_conflict"
    PORT_TAKEN = "port_taken"
    CONTAINER_EXITED = "container_exited"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_FALLBACK = "gpu_fallback"
    TEMPLATE_OUTDATED = "template_outdated"
    CANCELLED = "cancelled"


class ManagerError(Exception):
    """Base of all errors raised on purpose; `code` is stable and safe to match on."""

    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        instance: str | None = None,
        details: Mapping[str, object] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s


class ConfigurationError(ManagerError):
    """A configuration that cannot be used; the message names file, line and key."""

    code = "configuration_invalid"


class UnknownInstanceError(ManagerError):
    code = "unknown_instance"


class UnknownModelError(ManagerError):
    """The instance that was named does not have the model that was named."""

    code = Reason.MODEL_MISSING.value


class NoRouteError(ManagerError):
    """No instance can take a request that is not made; `code` is the reason."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.code = reason.value


class UnknownRequestError(ManagerError):
    code = "unknown_request"


class UnknownPullError(ManagerError):
    code = "unknown_pull"


class UnknownRunError(ManagerError):
    code = "unknown_run"


class UnknownBenchmarkError(ManagerError):
    code = "unknown_benchmark"


class UnknownWorkloadError(ManagerError):
    code = "unknown_workload"


class UnknownKeyError(ManagerError):
    code = "unknown_key"


class UnknownGpuError(ManagerError):
    code = "unknown_gpu"


class UnknownCollectionError(ManagerError):
    """There is no such collection, version or item; `code` says which."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotInstalledError(ManagerError):
    """An optional part of the program is missing; the message says how to install it."""

    code = "not_installed"


class InvalidRequestError(ManagerError):
    code = "invalid_request"


class RunsFullError(ManagerError):
    """As many runs as may be kept have not ended, or their files take all the room there is."""

    code = "queue_full"


class BenchmarksFullError(ManagerError):
    """As many benchmarks as may wait have not ended."""

    code = "queue_full"


class ConflictError(ManagerError):
    code = "conflict"


class EnsembleOffError(ConflictError):
    """The configuration has no ensemble."""

    code = "ensemble_off"


class CancelledByStopError(ConflictError):
    """A stop was asked for while the start was still going on."""

    code = Reason.CANCELLED.value


class DrainedError(ConflictError):
    """The instance is out of service by an operator's order."""

    code = "drained"


class LimitReachedError(ConflictError):
    code = "max_running_reached"


class NothingLoadedError(ConflictError):
    """A benchmark names no model, and no instance has one in memory."""

    code = "nothing_loaded"


class RunStateError(ConflictError):
    """The status of a run refuses it; `code` says which way."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code


class LockedError(ConflictError):
    code = "instance_locked"


class NameConflictError(ConflictError):
    code = Reason.NAME_CONFLICT.value


class StateDirHeldError(ConflictError):
    code = "state_dir_held"


class ManagerIdHeldError(ConflictError):
    code = "manager_id_held"


class ForeignOwnerError(ConflictError):
    """Containers with our manager id belong to another state directory, whose daemon may be alive."""

    code = "foreign_owner"


class ManagerIdChangedError(ConflictError):
    """`manager_id` was changed, and nobody would watch the containers under the former one."""

    code = "manager_id_changed"


class KeyConflictError(ConflictError):
    """The keys that there are refuse it; `code` says which way."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CollectionConflictError(ConflictError):
    """The state of a collection, a version or a backfill refuses it; `code` says which way."""

    def __init__(self, code: str, message: str, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message, details=details)
        self.code = code


class RequestEndedError(ConflictError):
    code = "request_ended"


class UnavailableError(ManagerError):
    """Something that is needed is not there; `reason` is what status shows."""

    def __init__(
        self,
        message: str,
        *,
        reason: Reason,
        instance: str | None = None,
        details: Mapping[str, object] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, instance=instance, details=details, retry_after_s=retry_after_s)
        self.reason = reason
        self.code = reason.value


class EngineError(UnavailableError):
    """The engine refused or failed a call; `reason` is the nearest entry of the list."""


class EngineUnreachableError(EngineError):
    """The engine is down, hung or cannot be reached; the reason is `overloaded` where we cannot ask it."""

    def __init__(
        self, message: str, *, reason: Reason = Reason.ENGINE_UNAVAILABLE, retry_after_s: float = 5
    ) -> None:
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)


class NoDescriptorForEngineError(EngineUnreachableError):
    """The process has no file descriptor left for a connection to the engine, which is not at fault."""

    def __init__(self) -> None:
        super().__init__(
            "the manager has no file descriptor left to ask the container engine; "
            "raise the limit of open files (ulimit -n)",
            reason=Reason.OVERLOADED,
            retry_after_s=1,
        )


class ContainerGoneError(EngineError):
    """The container that was named does not exist (any more)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.CONTAINER_EXITED)


class ArchiveTooLargeError(EngineError):
    """A file or folder of a container has more bytes than the caller takes."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.INSTANCE_UNAVAILABLE)


class NetworkMissingError(EngineError):
    """The network that the container asks for does not exist."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.START_FAILED)


class StartFailedError(UnavailableError):
    """A start did not end in a ready instance; `log_tail` is what its container last said."""

    def __init__(
        self,
        message: str,
        *,
        reason: Reason,
        instance: str | None = None,
        log_tail: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        details = {"log_tail": list(log_tail)} if log_tail else None
        super().__init__(
            message, reason=reason, instance=instance, details=details, retry_after_s=retry_after_s
        )
        self.log_tail = log_tail


class BackingOffError(StartFailedError):
    """Nothing was tried: the last start failed, or its run ended, too short a time ago."""


class AskFailedError(UnavailableError):
    """A server did not answer a request; `begun` is whether it may have begun with it."""

    def __init__(
        self,
        message: str,
        *,
        reason: Reason,
        begun: bool,
    ) -> None:
        super().__init__(message, reason=reason)
        self.begun = begun


class NotAnsweredError(UnavailableError):
    """No server has answered a request that the daemon makes itself.

    `refused` is set where none was asked, and says why.
    """

    def __init__(
        self, message: str, *, reason: Reason, refused: str | None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)
        self.refused = refused
        if refused in ("forbidden", "local_only", "rate_limited", "queue_full"):
            self.code = refused


class NotEmbeddedError(NotAnsweredError):
    """No server has embedded the texts of a request."""


class OutOfDescriptorsError(UnavailableError):
    """The process has no file descriptor left for a connection. No server is at fault: do not fail over."""

    def __init__(self) -> None:
        super().__init__(
            "the manager has no file descriptor left for a connection",
            reason=Reason.OVERLOADED,
            retry_after_s=1,
        )


class RegistryUnwritableError(UnavailableError):
    """The registry could not be written (disk full, read-only, locked); nothing was started."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.START_FAILED, retry_after_s=30)
        self.code = "registry_unwritable"


class RegistryDoubtfulError(RegistryUnwritableError):
    """The connection was lost while a write was to be committed: it happened completely or not at all."""


class VectorsUnavailableError(UnavailableError):
    """The tables of vectors could not be read or written; the disk or the process is at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.INSTANCE_UNAVAILABLE, retry_after_s=1)
        self.code = "vectors_unavailable"


class VectorsDamagedError(VectorsUnavailableError):
    """A table of vectors is missing or unreadable, or a part of it."""

    def __init__(self, message: str, *, table: int) -> None:
        super().__init__(message)
        self.code = "vectors_damaged"
        self.table = table


class RunFilesError(UnavailableError):
    """A file of a run could not be read or written (disk full, read-only, removed)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.START_FAILED, retry_after_s=30)
        self.code = "run_files_failed"


class GpuQueryError(ManagerError):
    """NVML did not answer in time, or answered with an error."""

    code = "gpu_query_failed"


class RegistryCorruptError(ManagerError):
    """The registry file cannot be read; it is left exactly as it is."""

    code = "registry_corrupt"


class IllegalTransitionError(Exception):
    """A table of transitions has no such row: the program is wrong, not the world. No user sees it."""

    def __init__(self, state: object, fact: object) -> None:
        super().__init__(f"no transition from {state} when {fact}")
