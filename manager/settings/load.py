"""Find the configuration file, bring all sources together, and say of each value where it came from."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from manager.settings import sources as source
from manager.settings.listed_models import translate_listed_models
from manager.settings.manifest import read_manifest
from manager.settings.model import COMPARED, Settings
from manager.settings.overlays import read_overlay
from manager.settings.ownership import can_read_as_owner, is_trusted, local_file_problem, open_regular, user
from manager.settings.problems import Problem, configuration_error, dotted, from_validation
from manager.settings.yaml_file import Document, read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from manager.settings.schema import KeyPath

LOCAL_FILE = Path("ollama-manager.yaml")
SYSTEM_FILE = Path("/etc/ollama-manager/config.yaml")

_GUESSABLE = 16
_LONGEST_KEY = 4096
_LONGEST_FILE = 64 * 1024
_MOST_KEYS = 32


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings with their origin.

    `file` is the configuration file that was read, None when there is none; `overlay` is the file of the
    environment that was named.
    """

    settings: Settings
    file: Path | None
    sources: tuple[source.Source, ...]
    overlay: Path | None = None

    def source_of(self, path: str | KeyPath) -> str:
        """`command line`, `environment NAME`, `file FILE:LINE` or `default`; a key is `server.port`."""
        return source.wrote(self._key(path), self.sources).description

    def kind_of_source(self, path: str | KeyPath) -> source.Kind:
        """As `source_of`, without the name."""
        return source.wrote(self._key(path), self.sources).kind

    def problem(self, path: str | KeyPath, text: str) -> Problem:
        """A problem with a setting, at the place where it, or what is nearest around it, was written."""
        key = self._key(path)
        return Problem(str(source.place_of(key, self.sources)), dotted(key), text)

    @staticmethod
    def _key(path: str | KeyPath) -> KeyPath:
        if isinstance(path, str):
            return tuple(int(word) if word.isdigit() else word for word in path.split("."))
        return path

    @property
    def file_name(self) -> str:
        """The absolute path of the file; empty where there is none."""
        return "" if self.file is None else str(self.file.absolute())


def load_settings(
    config: Path | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> LoadedSettings:
    """Read all settings: command line, environment, overlay, file, manifest, defaults, in this order.

    Mappings are merged, lists are replaced. `$OLLAMA_MANAGER_ENV` names the overlay, see `overlays`.

    Args:
        config: the file that was asked for; else `$OLLAMA_MANAGER_CONFIG`, `./ollama-manager.yaml` and
            `/etc/ollama-manager/config.yaml` are tried.
        overrides: what the command line says, nested like the file; None means not given.
        environ: the environment.

    Raises:
        ConfigurationError: with every problem that was found, each with its place.
    """
    problems: list[Problem] = []
    document = _find_document(config, environ)
    file = None if document is None else Path(document.file)
    is_named = config is not None or environ.get(f"{source.PREFIX}CONFIG", "").strip()
    overlay = read_overlay(file, environ, check=None if is_named else _refuse_untrusted)
    documents = [one for one in (overlay, document) if one is not None]
    for one in documents:
        translate_listed_models(one)
    files = tuple(source.configuration_file(one, environ) for one in documents)
    sources = (
        source.command_line(overrides or {}, environ),
        source.environment(environ, problems, _merged(files)),
        *files,
        source.defaults(environ),
    )
    place = str(source.place_of(("discovery", "manifest"), sources))
    manifest = read_manifest(_merged(sources), place, problems)
    if manifest is not None:
        documents.append(manifest)
        sources = (*sources[:-1], source.configuration_file(manifest, environ), sources[-1])
    problems += [problem for one in documents for problem in one.problems]
    if any(one.data is None for one in documents):
        raise configuration_error(problems)
    settings = _validated(sources, problems)
    if settings is None or problems:
        raise configuration_error(problems)
    return LoadedSettings(settings, file, sources, None if overlay is None else Path(overlay.file))


def read_keys(files: Sequence[Path], *, daemon_uid: int | None = None) -> tuple[str, ...]:
    """Return the keys in the operator's files: each line is one. The first one is for our own commands.

    Args:
        files: `server.key_file`.
        daemon_uid: whose daemon the keys are for, None for this process. A daemon of the caller's or of
            root's may have them, and one that can read the file by itself: it learns nothing new.

    Raises:
        ConfigurationError: unreadable, without a line that can be a key, or not for that daemon. The message
            never shows what a file contains.
    """
    keys = tuple(dict.fromkeys(key for file in files for key in _keys_in(file, daemon_uid)))
    if len(keys) > _MOST_KEYS:
        raise _key_refused(files[0], f"{len(keys)} keys in all files; expected at most {_MOST_KEYS}")
    return keys


def _keys_in(path: Path, daemon_uid: int | None) -> Iterator[str]:
    try:
        with open(open_regular(path), "rb") as stream:  # noqa: PTH123
            status = os.fstat(stream.fileno())  # of what is read, whatever the path leads to by now
            raw = stream.read(_LONGEST_FILE + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a path"
        why = "not a regular file" if isinstance(error, IsADirectoryError) else why
        raise _key_refused(path, f"{why}; expected a readable file") from error
    if daemon_uid is not None and not (is_trusted(daemon_uid) or can_read_as_owner(daemon_uid, status)):
        raise _key_refused(path, f"not a file of {user(daemon_uid)}, whose daemon would get it")
    if len(raw) > _LONGEST_FILE:
        raise _key_refused(path, f"more than {_LONGEST_FILE} bytes; expected a key a line")
    lines = [line.strip() for line in raw.split(b"\n")]
    if not any(lines):
        raise _key_refused(path, "empty; expected a line with the key")
    for number, key in enumerate(lines, 1):
        where = f"line {number}: " if sum(map(bool, lines)) > 1 else ""
        if len(key) > _LONGEST_KEY:
            raise _key_refused(path, f"{where}a key of more than {_LONGEST_KEY} characters")
        # A header carries these without quoting.
        if any(not 0x21 <= byte <= 0x7E for byte in key):  # noqa: PLR2004
            text = "the key holds a space or something that is not ASCII; expected neither"
            raise _key_refused(path, where + text)
        if key:
            yield key.decode("ascii")


def key_weaknesses(files: Sequence[Path], keys: Sequence[str]) -> tuple[str, ...]:
    """Weaknesses of keys that work; nothing of the keys themselves is said.

    Such a key is taken all the same: secrets that an engine mounts into a container are readable by
    everyone in it, and only its operator knows who could guess.
    """
    found = [
        f"{path} is open to every user of this machine; close it with chmod o= {path}"
        for path in files
        if path.stat().st_mode & stat.S_IRWXO
    ]
    found += [
        f"{', '.join(map(str, files))} holds {len(key)} characters, which can be guessed; "
        "use a random key of 16 or more"
        for key in keys
        if len(key) < _GUESSABLE
    ]
    return tuple(found)


def _key_refused(path: Path, text: str) -> Exception:
    return configuration_error([Problem(str(path), "server.key_file", text)])


def _find_document(config: Path | None, environ: Mapping[str, str]) -> Document | None:
    if config is not None:
        return _named_document(config, "--config")
    variable = f"{source.PREFIX}CONFIG"
    if name := environ.get(variable, "").strip():
        return _named_document(Path(name), variable)
    for candidate in (LOCAL_FILE, SYSTEM_FILE):
        try:
            if candidate == LOCAL_FILE:
                _refuse_untrusted(candidate)
            return read_document(candidate, regular=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise configuration_error([Problem(str(candidate), "", _cannot_read(error))]) from error
    return None


def _refuse_untrusted(file: Path) -> None:
    """A file that nobody named must not be somebody else's: it says where state and keys are.

    It is not passed over either: the next file would then be read in its place without anybody noticing.

    Raises:
        OSError: there is none, or it cannot be looked at.
        ConfigurationError: others may have written it.
    """
    if (problem := local_file_problem(file)) is None:
        return
    users = " or ".join(user(uid) for uid in sorted({os.geteuid(), 0}, reverse=True))
    expected = (
        f"{problem}. A configuration in the current directory counts only if file and directory belong to "
        f"{users} and nobody else can write to them; to read it all the same, name it: --config {LOCAL_FILE}"
    )
    raise configuration_error([Problem("", "", expected)])


def _named_document(file: Path, asked_by: str) -> Document:
    try:
        return read_document(file)
    except OSError as error:
        raise configuration_error([Problem(asked_by, "", f"{str(file)!r}; {_cannot_read(error)}")]) from error


def _cannot_read(error: OSError) -> str:
    return f"cannot be read ({error.strerror}); expected a YAML file"


def _merged(sources: tuple[source.Source, ...]) -> dict[str, Any]:
    class Merged(BaseSettings):
        model_config = SettingsConfigDict(extra="allow")

        @classmethod
        def settings_customise_sources(cls, *_: Any, **__: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            return sources

    return dict(Merged().model_extra or {})


def _validated(sources: tuple[source.Source, ...], problems: list[Problem]) -> Settings | None:
    """The settings that the sources make together; None when they make none, `problems` then says why."""
    values = _merged(sources)
    place = _placer(sources)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems += from_validation(error, Settings, place)
        wrong = {str(one["loc"][0]) for one in error.errors() if one["loc"]}
    # A wrong section keeps the others from being compared. Where it takes no part in that, compare them now.
    if wrong and not wrong & COMPARED:
        try:
            Settings.model_validate({key: value for key, value in values.items() if key not in wrong})
        except ValidationError as error:
            problems += from_validation(error, Settings, place)
    return None


def _placer(sources: tuple[source.Source, ...]) -> Callable[[KeyPath], str]:
    return lambda path: str(source.place_of(path, sources))
