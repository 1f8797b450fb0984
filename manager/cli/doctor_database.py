"""`doctor`: the database that gateways share."""

from __future__ import annotations

import asyncio

from manager.cli.findings import Finding, broken, fine
from manager.errors import ConfigurationError, RegistryCorruptError, RegistryUnwritableError


def database_finding(url: str) -> Finding:
    """Look at the schema of a database; it may be in use, and nothing of it is changed."""
    # The import costs half a second, and is only needed here.
    from manager.adapters.registry.extra import database_at  # noqa: PLC0415

    async def look() -> Finding:
        database = database_at(url)
        try:
            revision = await database.revision()
        finally:
            await database.close()
        if revision is None:
            return fine("database", f"{database.name} is empty; the first start makes the schema")
        return fine("database", f"{database.name} can be used (schema {revision})")

    try:
        return asyncio.run(look())
    except ConfigurationError as error:
        return broken("database", error.message, "install it where the daemon is installed")
    except RegistryCorruptError as error:
        remedy = "name a database of its own in state.url, or update this version"
        return broken("database", error.message, remedy)
    except RegistryUnwritableError as error:
        return broken("database", error.message, "start it, or correct state.url (docs/several-gateways.md)")
