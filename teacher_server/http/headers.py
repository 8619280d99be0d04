"""Names of the protocol's HTTP headers."""

DEADLINE_HEADER = "X-Deadline-S"
"""Seconds that the client waits, by default an hour."""

ROUTE_HEADER = "X-Session-Id"
"""Hash of the request's context. Ray Serve routes by it, a single server ignores it."""
