"""Translations between the dialect of a client and the protocol of a server. Pure."""

from __future__ import annotations

from manager.wire.translate.codec import DEFAULT_TRAITS, Clock, Traits, Untranslatable
from manager.wire.translate.idle import idle_answer
from manager.wire.translate.translation import Translation, refusal, speaks, translation

__all__ = [
    "DEFAULT_TRAITS",
    "Clock",
    "Traits",
    "Translation",
    "Untranslatable",
    "idle_answer",
    "refusal",
    "speaks",
    "translation",
]
