"""The first program of the simulated image: it makes sure that no SIGTERM is lost.

The kernel drops a SIGTERM for process 1 of a container that has no handler for it yet. Ollama is a Go program
and has one at once, Python needs 20 ms: a container that is stopped right after its start would live until
SIGKILL. A *blocked* signal is kept instead, so this program blocks SIGTERM before it starts Python, and
`ollama.main` unblocks it once a handler is there.
"""

from __future__ import annotations

import platform
import struct

_BASE_ADDRESS = 0x400000
_HEADERS_BYTES = 64 + 56

_X86_64_CODE = bytes.fromhex(
    "6800400000"  # push 0x4000              the set {SIGTERM}
    "4889e6"  # mov rsi, rsp
    "31ff"  # xor edi, edi                   SIG_BLOCK
    "31d2"  # xor edx, edx                   no old set
    "41ba08000000"  # mov r10d, 8            the size of a set
    "b80e000000"  # mov eax, 14              rt_sigprocmask
    "0f05"  # syscall
    "58"  # pop rax
    "488b0c24"  # mov rcx, [rsp]             argc
    "488d742408"  # lea rsi, [rsp+8]         argv
    "488d54cc10"  # lea rdx, [rsp+rcx*8+16]  envp
    "488d3d13000000"  # lea rdi, [rip+19]    the path that follows the code
    "b83b000000"  # mov eax, 59              execve
    "0f05"  # syscall
    "bf7f000000"  # mov edi, 127             it came back: not found
    "b83c000000"  # mov eax, 60              exit
    "0f05"  # syscall
)


def launcher(path: str) -> bytes | None:
    """A program that blocks SIGTERM and becomes `path`, its arguments the same; None if this is not x86-64.

    It is an ELF file of one segment, made by hand so that building the image takes no compiler.
    """
    if platform.machine() != "x86_64":
        return None
    code = _X86_64_CODE + path.encode() + b"\0"
    size = _HEADERS_BYTES + len(code)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian
    entry = _BASE_ADDRESS + _HEADERS_BYTES
    executable, x86_64 = 2, 62
    file_header = struct.pack(
        "<16sHHIQQQIHHHHHH", identity, executable, x86_64, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    loaded, read_and_execute, page = 1, 5, 0x1000
    segment = struct.pack(
        "<IIQQQQQQ", loaded, read_and_execute, 0, _BASE_ADDRESS, _BASE_ADDRESS, size, size, page
    )
    return file_header + segment + code
