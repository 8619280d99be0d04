"""HTTPS with a private certificate: clients that trust it score, the others get an error that names the setting."""

from __future__ import annotations

import datetime
import ipaddress
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.config.model import TeacherConfig
from common.protocol.schema import ItemScore
from common.protocol.scoring import TeacherError
from teacher_server.client import TeacherClient
from teacher_server.http.serve import build_service, start_in_thread
from tests.support.teacher_running import KEYS, authenticator, items


@dataclass(frozen=True)
class Pem:
    """Files of a self-signed certificate for 127.0.0.1."""

    certificate: Path
    key: Path


def make_certificate(folder: Path, name: str) -> Pem:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = Pem(folder / f"{name}.pem", folder / f"{name}.key")
    pem.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem.key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    return make_certificate(tmp_path_factory.mktemp("tls"), "mine")


@pytest.fixture(scope="module")
def url(tiny_model: Path, mine: Pem) -> Iterator[str]:
    config = TeacherConfig(model=str(tiny_model), threads=1, tls_certificate=mine.certificate, tls_key=mine.key)
    server = start_in_thread(build_service(config), config, authenticator())
    yield server.url
    server.stop()


async def test_who_trusts_the_certificate_scores(url: str, mine: Pem) -> None:
    assert url.startswith("https://")
    client = TeacherClient(url, "run", 30, KEYS["red"], ca_file=str(mine.certificate))
    response = await client.score(items(1, 3, response=200), "at_ids", 1.0, 8)
    await client.close()
    assert all(isinstance(result, ItemScore) for result in response.results)


@pytest.mark.parametrize("trusts", ["the system's", "another one"])
async def test_who_does_not_is_told_at_once_what_to_set(url: str, trusts: str, tmp_path: Path) -> None:
    other = str(make_certificate(tmp_path, "other").certificate) if trusts == "another one" else None
    client = TeacherClient(url, "run", 600, KEYS["red"], ca_file=other)
    began = time.monotonic()
    with pytest.raises(TeacherError, match=r"teacher\.ca_file") as caught:
        await client.info()
    await client.close()
    assert time.monotonic() - began < 5
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_https_to_a_server_without_it(tiny_model: Path) -> None:
    config = TeacherConfig(model=str(tiny_model), threads=1)
    server = start_in_thread(build_service(config), config, authenticator())
    client = TeacherClient(server.url.replace("http:", "https:"), "run", 600, KEYS["red"])
    with pytest.raises(TeacherError, match="use http://"):
        await client.info()
    await client.close()
    server.stop()


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        with pytest.raises(TeacherError, match=r"teacher\.ca_file"):
            TeacherClient("https://127.0.0.1:1", "run", 1, ca_file=str(path))
