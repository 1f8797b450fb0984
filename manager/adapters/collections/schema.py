"""The tables of the store of collections.

Triggers keep the numbers of items, vectors and items in quarantine, so that nobody counts rows; they also
keep the rubbish of each version. They hold for every change, cascades included.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

from manager.adapters.registry.opening import connect_existing

if TYPE_CHECKING:
    from pathlib import Path

# "OMEC": says whose database it is.
APPLICATION_ID: Final = 0x4F4D4543
SCHEMA_NUMBER: Final = 1
# Keys of collections and versions are never used again: AUTOINCREMENT. Numbers of items come from `meta`.
# `text` is the last column, so that the others are read without it.
# `items_in_order` has the numbers of the items of a collection: each index of SQLite ends with them.
# The rows of a collection or version in `removed` have no owner any more, and are being removed.
_SCHEMA = """
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    next_number INTEGER NOT NULL,
    is_closed INTEGER NOT NULL
);
INSERT INTO meta VALUES (1, 1, 1);
CREATE TABLE collections (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    prefix TEXT NOT NULL,
    asked INTEGER,
    truncates INTEGER NOT NULL,
    keeps_text INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    items INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE versions (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collections,
    model TEXT NOT NULL,
    digest TEXT,
    dimensions INTEGER NOT NULL,
    prefix TEXT NOT NULL,
    truncates INTEGER NOT NULL,
    asked INTEGER,
    state TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    activated_at INTEGER,
    archived_at INTEGER,
    stale_since INTEGER,
    policy TEXT,
    vectors INTEGER NOT NULL DEFAULT 0,
    quarantined INTEGER NOT NULL DEFAULT 0,
    leaves_rubbish INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX versions_of_collection ON versions (collection);
CREATE UNIQUE INDEX versions_active_once ON versions (collection) WHERE state = 'active';
CREATE TABLE backfills (
    collection INTEGER PRIMARY KEY REFERENCES collections,
    version INTEGER NOT NULL REFERENCES versions,
    status TEXT NOT NULL,
    threshold REAL NOT NULL,
    rate REAL,
    auto_cutover INTEGER NOT NULL,
    project TEXT NOT NULL,
    started_at INTEGER NOT NULL,
    ended_at INTEGER,
    error TEXT
);
CREATE INDEX backfills_of_version ON backfills (version);
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    collection INTEGER NOT NULL,
    id TEXT NOT NULL,
    metadata BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    text TEXT,
    UNIQUE (collection, id)
);
CREATE INDEX items_in_order ON items (collection);
CREATE TABLE vectors (
    version INTEGER NOT NULL,
    number INTEGER NOT NULL REFERENCES items ON DELETE CASCADE,
    at INTEGER NOT NULL,
    PRIMARY KEY (version, number)
) WITHOUT ROWID;
CREATE INDEX vectors_of_item ON vectors (number);
CREATE TABLE failures (
    version INTEGER NOT NULL,
    number INTEGER NOT NULL REFERENCES items ON DELETE CASCADE,
    attempts INTEGER NOT NULL,
    message TEXT NOT NULL,
    is_quarantined INTEGER NOT NULL,
    PRIMARY KEY (version, number)
) WITHOUT ROWID;
CREATE INDEX failures_of_item ON failures (number);
CREATE TABLE rubbish (
    version INTEGER NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (version, number)
) WITHOUT ROWID;
CREATE TABLE removed (
    kind TEXT NOT NULL,
    key INTEGER NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE TRIGGER item_added AFTER INSERT ON items BEGIN
    UPDATE collections SET items = items + 1 WHERE key = new.collection;
END;
CREATE TRIGGER item_removed AFTER DELETE ON items BEGIN
    UPDATE collections SET items = items - 1 WHERE key = old.collection;
END;
CREATE TRIGGER vector_added AFTER INSERT ON vectors BEGIN
    UPDATE versions SET vectors = vectors + 1 WHERE key = new.version;
    DELETE FROM failures WHERE version = new.version AND number = new.number;
    DELETE FROM rubbish WHERE version = new.version AND number = new.number;
END;
CREATE TRIGGER vector_removed AFTER DELETE ON vectors BEGIN
    UPDATE versions SET vectors = vectors - 1 WHERE key = old.version;
    INSERT INTO rubbish SELECT key, old.number FROM versions WHERE key = old.version AND leaves_rubbish;
END;
CREATE TRIGGER failure_added AFTER INSERT ON failures WHEN new.is_quarantined BEGIN
    UPDATE versions SET quarantined = quarantined + 1 WHERE key = new.version;
END;
CREATE TRIGGER failure_changed AFTER UPDATE ON failures BEGIN
    UPDATE versions SET quarantined = quarantined + new.is_quarantined - old.is_quarantined
    WHERE key = new.version;
END;
CREATE TRIGGER failure_removed AFTER DELETE ON failures WHEN old.is_quarantined BEGIN
    UPDATE versions SET quarantined = quarantined - 1 WHERE key = old.version;
END;
"""


def build(path: Path, first_version: int) -> None:
    """Make the tables in an empty file, all of them or none; versions have keys from `first_version` on."""
    with closing(connect_existing(path)) as connection:
        pragmas = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_NUMBER};"
        seed = f"INSERT INTO sqlite_sequence VALUES ('versions', {first_version - 1:d});"  # noqa: S608
        connection.executescript(f"BEGIN; {_SCHEMA} {seed} {pragmas} COMMIT;")
        connection.execute("PRAGMA journal_mode=WAL").close()
