"""Names of the headers that clients and servers of scores agree on."""

DEADLINE_HEADER = "X-Deadline-S"
"""Seconds that the client will wait; without it, an hour."""

ROUTE_HEADER = "X-Session-Id"
"""Holds the hash of the context that a request is about: Ray Serve routes by it, a single server ignores it."""
