"""Ollama Endpoint Manager: one daemon that starts, stops, watches and guards Ollama containers."""

from importlib.metadata import version

__version__ = version("ollama-endpoint-manager")
