"""Errors of a request's body; the messages are for the client."""

from __future__ import annotations


class BadBodyError(ValueError):
    """The body cannot be understood."""


class BodyTooLargeError(BadBodyError):
    """The body has more than `most_bytes`, decoded."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the request body is too large: at most {most_bytes} bytes are taken")


class NoRoomError(Exception):
    """The bytes of a body, decoded, do not fit beside those of all other requests."""
