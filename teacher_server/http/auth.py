"""Bearer keys of tenants, stored as hashes only.

A key file has one line per key, ``TENANT SHA256_HEX``; ``#`` starts a comment. The environment variable
`KEYS_VARIABLE` may hold the same lines, separated by commas or line ends. A key has 256 random bits, so its plain hash
reveals nothing. A tenant may have several keys, for example while one replaces another.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.protocol.scoring import TeacherError

ANONYMOUS = "anonymous"
"""Tenant of every request to a teacher without keys."""

OPERATOR = "operator"
"""Tenant whose keys may read ``/metrics``, which show all runs."""

KEYS_VARIABLE = "OPCD_TEACHER_KEYS"
"""Environment variable that replaces a key file."""

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_LINE = re.compile(r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(?P<digest>[0-9a-f]{64})")


class NotAuthorised(Exception):
    """The key is missing or unknown. The text neither contains the key nor says which part is wrong."""


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Maps an ``Authorization`` header to a tenant; without keys, always to `ANONYMOUS`.

    The tenant `reader` may read ``/metrics``.
    """

    digests: tuple[tuple[str, bytes], ...] = ()
    reader: str = OPERATOR

    def tenant(self, header: str | None) -> str:
        """The tenant of a request. Takes the same time for every key, valid or not. Raises NotAuthorised."""
        if not self.digests:
            return ANONYMOUS
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for tenant, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            raise NotAuthorised("send a valid key as `Authorization: Bearer KEY`")
        return found

    def may_read_metrics(self, tenant: str) -> bool:
        """Tell if a tenant may read the metrics, which name the runs of every tenant."""
        return tenant == (self.reader if self.digests else ANONYMOUS)


def new_key() -> tuple[str, str]:
    """Make a key and its hash, the second column of a key file."""
    key = secrets.token_urlsafe(32)
    return key, key_digest(key)


def key_digest(key: str) -> str:
    """Hash of a key, as a key file stores it."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> Authenticator:
    """Read a key file. Raises TeacherError, which names a bad line but not its content."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher.server_keys_file {path} cannot be read: {error}") from error
    return Authenticator(tuple(_parse(lines, str(path))))


def single_key(key: str, tenant: str = "run") -> Authenticator:
    """One key for one tenant, which may also read the metrics: the teacher of one run."""
    return Authenticator(((tenant, bytes.fromhex(key_digest(key))),), reader=tenant)


def authenticator(
    host: str, server_keys_file: Path | None, *, allow_anonymous: bool, environ: Mapping[str, str] = os.environ
) -> Authenticator:
    """Read the keys named by the configuration or the environment.

    Raises TeacherError without keys, unless anonymous access is allowed on a loopback address, and for two key sources.
    """
    text = environ.get(KEYS_VARIABLE)
    if server_keys_file is not None and text is not None:
        raise TeacherError(f"teacher.server_keys_file and {KEYS_VARIABLE} are both set: keep one")
    if server_keys_file is not None:
        return _require_keys(read_keys(server_keys_file), f"teacher.server_keys_file {server_keys_file}")
    if text is not None:
        lines = text.replace(",", "\n").splitlines()
        return _require_keys(Authenticator(tuple(_parse(lines, KEYS_VARIABLE))), KEYS_VARIABLE)
    if not allow_anonymous:
        raise TeacherError(
            f"this teacher has no keys: set teacher.server_keys_file or {KEYS_VARIABLE} (`opcd key TENANT` makes a "
            "key), or teacher.allow_anonymous=true on a loopback address"
        )
    if host not in LOOPBACK:
        raise TeacherError(
            f"teacher.allow_anonymous works on a loopback address only, teacher.host is {host}: "
            f"set teacher.server_keys_file or {KEYS_VARIABLE}"
        )
    return Authenticator()


def _require_keys(found: Authenticator, source: str) -> Authenticator:
    if not found.digests:
        raise TeacherError(f"{source} holds no key: add one with `opcd key TENANT`")
    return found


def _parse(lines: Sequence[str], source: str) -> Iterable[tuple[str, bytes]]:
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise TeacherError(f"{source}:{number}: expected `TENANT SHA256_HEX`, as `opcd key TENANT` prints it")
        yield match["tenant"], bytes.fromhex(match["digest"])
