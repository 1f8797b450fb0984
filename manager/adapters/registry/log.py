"""SQLite's write-ahead log, checked for what SQLite itself passes over in silence.

SQLite reads a log up to the first frame that does not fit, and drops the rest: that is how it forgets a
transaction that was never finished. A log whose header or whose middle was damaged looks the same to it, and
finished transactions are lost. Format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import sqlite3
import struct
from contextlib import closing
from pathlib import Path

# Magic number, format, page size, checkpoint number, two salts, two checksums; all of them big-endian.
_HEADER = struct.Struct(">8I")
# Page number, size of the database after a commit (0 in all other frames), two salts, two checksums.
_FRAME = struct.Struct(">6I")
# https://www.sqlite.org/walformat.html: the number of valid frames in a log's index, in this machine's order.
_INDEX = struct.Struct("=16xI")
_MAGIC = 0x377F0682  # the last bit set: checksums are over big-endian words
_FORMAT = 3007000
_SMALLEST_PAGE, _LARGEST_PAGE = 512, 65536
_CHUNK = 2**16


def wal_problem(wal: Path) -> str | None:
    """The reason why SQLite would take a log that is not empty for an empty one; None where it reads it.

    Only zeros are what a power failure leaves of a log that was just made: nothing was in it.

    Raises:
        OSError: it cannot be read.
    """
    with wal.open("rb") as file:
        header = file.read(_HEADER.size)
        if _is_header(header):
            return None
        chunk = header
        while chunk:
            if any(chunk):
                return (
                    f"the header of its write-ahead log {wal} is damaged; what was written last is in there"
                )
            chunk = file.read(_CHUNK)
    return None


def wal_gap(connection: sqlite3.Connection, wal: Path) -> str | None:
    """The reason why SQLite reads less of a log than was finished; None where it reads all.

    Args:
        connection: of a copy of the database and the log; a checkpoint is made there.
        wal: the log itself.

    Raises:
        OSError, sqlite3.Error: it cannot be read.
    """
    row = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return gap_behind(max(0, int(row[1])), wal)


def frames_read(database: Path) -> int:
    """Return the number of frames of a log that SQLite reads.

    Args:
        database: has the right size and first page, and a copy of the log beside it. It is changed.

    Raises:
        OSError, sqlite3.Error: it cannot be read.
    """
    with closing(sqlite3.connect(database)) as connection:
        # Takes the log in, and does not read the schema, which may be anywhere in the file.
        connection.execute("PRAGMA user_version").fetchone()
        index = Path(f"{database}-shm").read_bytes()
    return int(_INDEX.unpack_from(index)[0])


def gap_behind(read: int, wal: Path) -> str | None:
    """The reason why a log has more finished transactions than the frames that SQLite reads.

    Behind the last of these frames, one transaction may stand that was never finished. Frames of the same
    generation (their salts say so) that finish two of them mean that an earlier frame was damaged.

    Raises:
        OSError: it cannot be read.
    """
    commits = 0
    with wal.open("rb") as file:
        header = file.read(_HEADER.size)
        if not _is_header(header):
            return None
        _, _, page_size, _, *salts, _, _ = _HEADER.unpack(header)
        file.seek(_HEADER.size + read * (_FRAME.size + page_size))
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            _, size_after_commit, *frame_salts, _, _ = _FRAME.unpack(frame)
            commits += frame_salts == salts and size_after_commit > 0
            if commits > 1:
                return f"its write-ahead log {wal} is damaged behind {read} pages, and goes on after that"
            file.seek(page_size, 1)
    return None


def _is_header(header: bytes) -> bool:
    if len(header) < _HEADER.size:
        return False
    magic, version, page_size, _, _, _, *checksum = _HEADER.unpack(header)
    return (
        magic & ~1 == _MAGIC
        and version == _FORMAT
        and _SMALLEST_PAGE <= page_size <= _LARGEST_PAGE
        and page_size & (page_size - 1) == 0
        and list(_checksum(header[:24], big_endian=bool(magic & 1))) == checksum
    )


def _checksum(data: bytes, *, big_endian: bool) -> tuple[int, int]:
    """Section 4.2 of the format: two running sums modulo 2**32 over pairs of words."""
    first = second = 0
    for one, two in struct.iter_unpack(">2I" if big_endian else "<2I", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
