"""The type of an image, from its first bytes."""

from __future__ import annotations

from base64 import b64decode
from binascii import Error

# Four characters of base64 are three bytes; the longest mark ends at byte 12.
_LOOK = 16
_MARKS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
)
IMAGE_TYPES = "PNG, JPEG, GIF, WebP and BMP"


def media_type_of(data: str) -> str | None:
    """Return the media type of an image in base64, or None where it is none of IMAGE_TYPES."""
    try:
        first = b64decode(data[:_LOOK], validate=True)
    except (Error, ValueError):
        return None
    if first.startswith(b"RIFF") and first[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for mark, kind in _MARKS if first.startswith(mark)), None)
