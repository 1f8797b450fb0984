"""Connections to the servers: pooled, one request at a time on each, framed by llhttp."""

from manager.relay.upstream.address import Address
from manager.relay.upstream.connection import AnswerHead, ResponseSink, UpstreamConnection
from manager.relay.upstream.pool import UpstreamPool, UpstreamPools

__all__ = ["Address", "AnswerHead", "ResponseSink", "UpstreamConnection", "UpstreamPool", "UpstreamPools"]
