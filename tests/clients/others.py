"""The clients of `make test-clients`: what is installed for each, and how its program is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".build" / "clients"
PROGRAMS = Path(__file__).parent / "programs"
OLLAMA_VERSIONS = ("v0.6.5", "v0.33.0")


@dataclass(frozen=True, slots=True)
class Client:
    """A client library in one version.

    Args:
        name: of its directory below `HOME`.
        program: below `programs/`.
        packages: what the package manager of its language is asked for.
    """

    name: str
    program: str
    packages: tuple[str, ...]

    @property
    def home(self) -> Path:
        return HOME / self.name

    @property
    def command(self) -> tuple[str, ...]:
        match Path(self.program).suffix:
            case ".py":
                module = f"tests.clients.programs.{Path(self.program).stem}"
                return (str(self.home / "bin" / "python"), "-m", module)
            case ".mjs":
                return ("node", str(self.home / self.program))
            case _:
                return (str(self.home / "client"),)


# Clients before httpx 0.28 pass it an argument that it no longer has.
_OLD_HTTPX = "httpx<0.28"

CLIENTS = (
    Client("openai-0.28", "openai_client.py", ("openai==0.28.1",)),
    Client("openai-1.0", "openai_client.py", ("openai==1.0.0", _OLD_HTTPX)),
    Client("openai-1.30", "openai_client.py", ("openai==1.30.0", _OLD_HTTPX)),
    Client("openai-newest", "openai_client.py", ("openai",)),
    Client("ollama-0.1", "ollama_client.py", ("ollama==0.1.2",)),
    Client("ollama-newest", "ollama_client.py", ("ollama",)),
    Client("anthropic-0.34", "anthropic_client.py", ("anthropic==0.34.0", _OLD_HTTPX)),
    Client("anthropic-newest", "anthropic_client.py", ("anthropic",)),
    Client("node-openai-3", "openai3.mjs", ("openai@3.3.0",)),
    Client("node-openai-4", "openai.mjs", ("openai@4.104.0",)),
    Client("node-openai-newest", "openai.mjs", ("openai@latest",)),
    Client("node-ollama-0.5", "ollama.mjs", ("ollama@0.5.0",)),
    Client("node-ollama-newest", "ollama.mjs", ("ollama@latest",)),
    Client("node-anthropic-newest", "anthropic.mjs", ("@anthropic-ai/sdk@latest",)),
    Client("go-openai-1.12", "openai.go.in", ("github.com/openai/openai-go@v1.12.0",)),
    Client("go-openai-3.98", "openai.go.in", ("github.com/openai/openai-go/v3@v3.98.0",)),
    Client("go-openai-newest", "openai.go.in", ("github.com/openai/openai-go/v3@latest",)),
)
