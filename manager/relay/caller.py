"""The client of a request, by its head; read once for all requests with the same head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from manager.wire.access import for_pages
from manager.wire.encoding import CONTENT_ENCODING, encoding_of
from manager.wire.head import ambiguity, forwarded

if TYPE_CHECKING:
    from manager.domain.keys import Grant
    from manager.relay.relay import Relay
    from manager.relay.upstream import Address
    from manager.services.requests import Origin
    from manager.wire.access import Refusal
    from manager.wire.encoding import Encoding
    from manager.wire.head import Header
    from manager.wire.routes import Route


@dataclass(slots=True)
class Caller:
    """The facts that all requests with one head to one route share.

    `ambiguity` is why nobody could serve it: its framing, or a header of ours that makes no sense.
    `lines` are those of it that the server is to see, `for_page` those of the answer that let a page read it.
    `grant` is the key, None where none is needed; that of a refused request too where its key is known.
    `encoding` is that of the body where it is decoded here. `version` is that of the rules of access.
    """

    route: Route
    headers: list[Header]
    ambiguity: str | None
    refusal: Refusal | None
    lines: bytes
    for_page: bytes
    origin: Origin
    encoding: Encoding | None
    version: int
    grant: Grant | None = None
    _begun: tuple[Address, bytes, tuple[Header, ...], bytes] | None = None

    def head_for(self, address: Address, target: bytes, added: tuple[Header, ...] = ()) -> bytes:
        """Return the head of a request to that server, but for the lines that differ from one to the next."""
        begun = self._begun
        if begun is not None and begun[0] is address and begun[1] == target and begun[2] == added:
            return begun[3]
        more = b"".join(b"%b: %b\r\n" % header for header in added)
        head = b"POST %b%b HTTP/1.1\r\nHost: %b\r\n%b%b" % (
            address.prefix,
            target,
            address.host,
            self.lines,
            more,
        )
        self._begun = (address, target, added, head)
        return head


class KnownHead(NamedTuple):
    """A head that was parsed: all bytes before the digits of its length and after them."""

    before: bytes
    after: bytes
    caller: Caller
    target: bytes


def read_caller(relay: Relay, route: Route, headers: list[Header], *, modern: bool = True) -> Caller:
    """Read a head.

    Args:
        relay: has the names of headers and the check of access.
        route: that was asked for.
        headers: names in lower case.
        modern: whether the request has HTTP/1.1. One with HTTP/1.0 may come without a Host, so that what was
            read of it holds for no other request.
    """
    refusal, grant = relay.access.check("POST", route.path, headers, needs_host=modern)
    origin = relay.requests.origin(headers, grant)
    encoding = encoding_of(route, headers)
    withheld = relay.requests.names.all
    if encoding is not None:
        withheld = withheld | {CONTENT_ENCODING}
    return Caller(
        route=route,
        headers=headers,
        ambiguity=ambiguity(headers) or (origin.fault if refusal is None else None),
        refusal=refusal,
        lines=b"".join(forwarded(headers, withheld)),
        for_page=b"".join(b"%b: %b\r\n" % line for line in for_pages(headers, refusal)),
        origin=origin,
        encoding=encoding,
        version=relay.access.version,
        grant=grant,
    )
