"""What the head of a request says of its caller, worked out once for all requests that say the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.wire.access import for_pages
from manager.wire.caller import shown
from manager.wire.head import ambiguity, forwarded
from manager.wire.trace import read_traceparent

if TYPE_CHECKING:
    from manager.relay.relay import Relay
    from manager.relay.upstream import Address
    from manager.wire.access import Refusal
    from manager.wire.head import Header


@dataclass(slots=True)
class Caller:
    """What is the same for all requests with one head.

    `lines` are those of it that the server is to see, `for_page` those of the answer that let a page read it;
    `trace` is id, span and flags as they came.
    """

    headers: list[Header]
    ambiguity: str | None
    refusal: Refusal | None
    lines: bytes
    for_page: bytes
    instance: str | None
    lane: str | None
    project: str
    intent: str | None
    trace: tuple[str, str, str] | None
    _begun: tuple[Address, bytes, bytes] | None = None

    def head_for(self, address: Address, target: bytes) -> bytes:
        """The head of a request to that server, but for the lines that differ from one to the next."""
        begun = self._begun
        if begun is not None and begun[0] is address and begun[1] == target:
            return begun[2]
        head = b"POST %b%b HTTP/1.1\r\nHost: %b\r\n%b" % (address.prefix, target, address.host, self.lines)
        self._begun = (address, target, head)
        return head


def read_caller(relay: Relay, path: str, headers: list[Header], *, modern: bool = True) -> Caller:
    """Read a head.

    Args:
        relay: whose names of headers and whose check of access count.
        path: without the query.
        headers: names in lower case.
        modern: whether the request has HTTP/1.1. One with HTTP/1.0 may come without a Host; its connection
            ends with its answer, so that no other version finds what was read of it.
    """
    given = dict(headers)
    refusal = relay.access.refusal(path, headers, needs_host=modern)
    names = relay.headers
    return Caller(
        headers=headers,
        ambiguity=ambiguity(headers),
        refusal=refusal,
        lines=b"".join(forwarded(headers, names.all)),
        for_page=b"".join(b"%b: %b\r\n" % line for line in for_pages(headers, refusal)),
        instance=shown(given.get(names.instance)),
        lane=shown(given.get(names.lane)),
        project=shown(given.get(names.project)) or relay.default_project,
        intent=shown(given.get(names.intent)),
        trace=read_traceparent(given.get(b"traceparent")),
    )
