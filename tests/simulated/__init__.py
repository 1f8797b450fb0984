"""A stand-in for Ollama, of the standard library alone, and the image that it runs in."""
