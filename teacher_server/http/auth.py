"""Who asks: bearer keys of tenants, kept as hashes only.

A key file has one line per key, ``TENANT SHA256_HEX``; ``#`` starts a comment. The environment variable
`KEYS_VARIABLE` may hold the same lines, commas between them or line ends. Keys are 256 random bits, so a plain hash of
one tells nothing about it. Several keys of one tenant may stand side by side while they are being changed.
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
"""The tenant of everybody where no key is asked for."""

OPERATOR = "operator"
"""The tenant whose keys may read ``/metrics``, which show all runs."""

KEYS_VARIABLE = "OPCD_TEACHER_KEYS"
"""The environment variable that may stand in a key file's place."""

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_LINE = re.compile(r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(?P<digest>[0-9a-f]{64})")


class NotAuthorised(Exception):
    """No key, or one that is not known here. The text never says which part was wrong, nor holds the key."""


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Maps an ``Authorization`` header to a tenant. Without keys everybody is `ANONYMOUS`. The tenant `reader` may read
    ``/metrics``.
    """

    digests: tuple[tuple[str, bytes], ...] = ()
    reader: str = OPERATOR

    def tenant(self, header: str | None) -> str:
        """The tenant of a request; raises NotAuthorised. Takes the same time whichever key matches, or none."""
        if not self.digests:
            return ANONYMOUS
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for tenant, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            raise NotAuthorised("a bearer key of this teacher is needed")
        return found

    def may_read_metrics(self, tenant: str) -> bool:
        """Metrics name every tenant's runs: only one sees them where there are tenants."""
        return tenant == (self.reader if self.digests else ANONYMOUS)


def new_key() -> tuple[str, str]:
    """A fresh key and its hash, the second column of a key file."""
    key = secrets.token_urlsafe(32)
    return key, key_digest(key)


def key_digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> Authenticator:
    """Keys from a file; raises TeacherError that names the line (never its content)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher.server_keys_file {path} cannot be read: {error}") from error
    return Authenticator(tuple(_parse(lines, str(path))))


def single_key(key: str, tenant: str = "run") -> Authenticator:
    """One key for one tenant, who may read the metrics too: a teacher that belongs to a run."""
    return Authenticator(((tenant, bytes.fromhex(key_digest(key))),), reader=tenant)


def authenticator(
    host: str, server_keys_file: Path | None, *, allow_anonymous: bool, environ: Mapping[str, str] = os.environ
) -> Authenticator:
    """From the configuration and the environment.

    Raises TeacherError where everybody could score and nobody said so, or where it is unclear which keys are meant.
    """
    text = environ.get(KEYS_VARIABLE)
    if server_keys_file is not None and text is not None:
        raise TeacherError(f"teacher.server_keys_file and {KEYS_VARIABLE} are both set: keep one of them")
    if server_keys_file is not None:
        return _with_keys(read_keys(server_keys_file), f"teacher.server_keys_file {server_keys_file}")
    if text is not None:
        lines = text.replace(",", "\n").splitlines()
        return _with_keys(Authenticator(tuple(_parse(lines, KEYS_VARIABLE))), KEYS_VARIABLE)
    if not allow_anonymous:
        raise TeacherError(
            f"this teacher has no keys: set teacher.server_keys_file or {KEYS_VARIABLE} (`opcd key TENANT` makes one), "
            "or teacher.allow_anonymous=true on a loopback address"
        )
    if host not in LOOPBACK:
        raise TeacherError(
            f"teacher.allow_anonymous is for loopback addresses, teacher.host is {host}: "
            f"set teacher.server_keys_file or {KEYS_VARIABLE}"
        )
    return Authenticator()


def _with_keys(found: Authenticator, where: str) -> Authenticator:
    if not found.digests:
        raise TeacherError(f"{where} holds no key: add one with `opcd key TENANT`")
    return found


def _parse(lines: Sequence[str], path: str) -> Iterable[tuple[str, bytes]]:
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise TeacherError(f"{path}:{number}: expected `TENANT SHA256_HEX`, as `opcd key TENANT` prints it")
        yield match["tenant"], bytes.fromhex(match["digest"])
