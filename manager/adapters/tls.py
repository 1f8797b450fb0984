"""The TLS context that all clients of the process share."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from manager.descriptors import has_descriptors
from manager.errors import OutOfDescriptorsError

if TYPE_CHECKING:
    from pathlib import Path


class SharedTls:
    """A client context, built in a thread at its first use: to read the authorities takes 40 to 70 ms.

    Args:
        cafile: the authorities to trust; the system's by default.
    """

    def __init__(self, cafile: str | Path | None = None) -> None:
        self._cafile = cafile
        self._context: ssl.SSLContext | None = None
        self._building = asyncio.Lock()

    async def context(self) -> ssl.SSLContext:
        """Return the context; concurrent first uses build one.

        Raises:
            OSError: the authorities cannot be read.
            OutOfDescriptorsError: the process lacks the descriptor that reading them takes.
        """
        if self._context is None:
            async with self._building:
                if self._context is None:
                    self._context = await asyncio.to_thread(self._build)
        return self._context

    def _build(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._cafile)
        # OpenSSL skips a default store that it cannot open. Such a context trusts nobody: do not keep it.
        if not context.cert_store_stats()["x509_ca"] and not has_descriptors():
            raise OutOfDescriptorsError
        return context
