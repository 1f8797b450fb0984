"""Translations between the dialect of a client and the protocol of a server. Pure."""
