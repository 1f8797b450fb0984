"""Accounts: who may do what, what it costs, and what was used."""
