"""The log writer on real pipes, files and devices: nothing blocks a caller, and nothing is lost uncounted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from io import FileIO
from time import monotonic
from typing import TYPE_CHECKING

import pytest
import structlog.testing

from manager.adapters.log_writer import LogWriter
from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = b"x" * 1023 + b"\n"
# The default size of a pipe is 64 KiB.
MORE_THAN_A_PIPE_TAKES = 200


@contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """Both ends: to read from, and to write to."""
    reads, writes = os.pipe()
    with FileIO(reads, "r") as from_it, FileIO(writes, "w") as to_it:
        yield from_it, to_it


def test_lines_come_out_in_the_order_of_each_thread() -> None:
    with pipe() as (reads, writes):
        writer = LogWriter(writes.fileno())
        found: list[bytes | None] = []
        reader = threading.Thread(target=lambda: found.append(reads.readall()))
        reader.start()

        def write(name: bytes) -> None:
            for number in range(1000):
                writer.write(b"%b %d\n" % (name, number))

        threads = [threading.Thread(target=write, args=(name,)) for name in (b"a", b"b", b"c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.close(10)
        writes.close()
        reader.join()
        lines = (found[0] or b"").splitlines()
        for name in (b"a", b"b", b"c"):
            assert [line for line in lines if line[:1] == name] == [b"%b %d" % (name, n) for n in range(1000)]
        assert len(lines) == 3000
        assert writer.dropped == 0


def test_a_line_is_written_without_waiting_for_the_next() -> None:
    with pipe() as (reads, writes):
        writer = LogWriter(writes.fileno())
        writer.write(b"alone\n")
        assert reads.read(100) == b"alone\n"
        writer.close()


@pytest.mark.parametrize(
    ("most_lines", "most_bytes", "kept"), [(300, 2**30, 300), (10**6, 256 * 1024, 256), (10**6, 1023, 0)]
)
def test_a_pipe_that_nobody_reads_blocks_nobody_and_costs_counted_lines(
    most_lines: int, most_bytes: int, kept: int
) -> None:
    with pipe() as (reads, writes), structlog.testing.capture_logs() as reports:
        writer = LogWriter(writes.fileno(), most_lines=most_lines, most_bytes=most_bytes)
        began_at = monotonic()
        for number in range(1000):
            writer.write(b"%04d" % number + LINE[4:])
        assert monotonic() - began_at < 1
        # What the pipe took has left the queue, and has made room for as much.
        assert 1000 - kept - 64 <= writer.dropped <= 1000 - kept
        dropped = writer.dropped
        received: list[bytes] = []
        while len(received) < 1000 - dropped:
            received += (reads.read(len(LINE)) or b"").splitlines()
        numbers = [int(line[:4]) for line in received]
        assert numbers == sorted(numbers)
        if kept:
            # A write that ends after the first loss reports what was lost by then.
            wait_for(lambda: sum(report["lines"] for report in reports) == dropped, within_s=10)
            assert {report["event"] for report in reports} == {"log_lines_dropped"}
            writer.write(b"again\n")
            assert reads.read(100) == b"again\n"
        assert writer.close(10)
        assert sum(report["lines"] for report in reports) == (dropped if kept else 0)


def test_the_end_waits_for_a_slow_reader_but_only_so_long() -> None:
    with pipe() as (reads, writes):
        writer = LogWriter(writes.fileno())
        for _ in range(MORE_THAN_A_PIPE_TAKES):
            writer.write(LINE)
        began_at = monotonic()
        assert not writer.close(0.2)
        assert 0.2 <= monotonic() - began_at < 2
        writer.write(b"late\n")
        assert writer.dropped == 1
        left = MORE_THAN_A_PIPE_TAKES * len(LINE)
        while left:
            left -= len(reads.read(left) or b"")
        assert writer.close(10)


def test_a_full_disk_and_a_closed_pipe_cost_lines_and_nothing_else() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    writer = LogWriter(full)
    os.close(full)
    for _ in range(50):
        writer.write(LINE)
    assert writer.close(10)
    assert writer.dropped == 50
    with pipe() as (reads, writes):
        reads.close()
        writer = LogWriter(writes.fileno())
        for _ in range(50):
            writer.write(LINE)
        assert writer.close(10)
        assert writer.dropped == 50


def test_a_terminal_that_another_process_made_non_blocking_loses_nothing() -> None:
    with pipe() as (reads, writes):
        os.set_blocking(writes.fileno(), False)
        writer = LogWriter(writes.fileno())
        for _ in range(MORE_THAN_A_PIPE_TAKES):
            writer.write(LINE)
        found: list[bytes | None] = []
        reader = threading.Thread(target=lambda: found.append(reads.readall()))
        reader.start()
        assert writer.close(10)
        writes.close()
        reader.join()
        assert found[0] == LINE * MORE_THAN_A_PIPE_TAKES
        assert writer.dropped == 0


def test_a_line_cut_by_a_full_disk_is_ended_before_the_next(tmp_path: object) -> None:
    # The limit of a file's size cuts a write as a full disk does, and can be lifted again.
    program = """
import os, resource, sys, time
from manager.adapters.log_writer import LogWriter
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
writer = LogWriter(file)
def until_empty():
    while writer._count: time.sleep(0.001)
for number in range(4):
    writer.write(b"%d" % number + b"x" * 98 + b"\\n")
until_empty()
assert writer.dropped == 2, writer.dropped
writer.write(b"lost\\n")
until_empty()
assert writer.dropped == 3, writer.dropped
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(b"whole again\\n")
assert writer.close(10)
assert writer.dropped == 3, writer.dropped
"""
    file = f"{tmp_path}/log"
    subprocess.run([sys.executable, "-c", program, file], check=True, timeout=60)
    with open(file, "rb") as stream:  # noqa: PTH123
        lines = stream.read().splitlines()
    assert [line[:1] for line in lines] == [b"0", b"1", b"2", b"w"]
    assert lines[-1] == b"whole again"


def test_without_a_descriptor_lines_go_nowhere() -> None:
    writer = LogWriter(None)
    writer.write(LINE)
    assert writer.close(10)
    assert writer.dropped == 0
    assert not writer.is_terminal


def test_the_end_of_the_process_writes_what_is_queued() -> None:
    program = "from manager.adapters.log_writer import LogWriter; LogWriter(2).write(b'last words\\n' * 5)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    assert done.stderr == b"last words\n" * 5
