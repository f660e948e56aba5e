"""Mutual TLS between drivers and ``lightvllm worker``, with real certificates: each side proves itself to the other."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from k8s_servers import WORKER, worker_command, write_token
from waiting import LIMIT

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.errors import AuthError, PlacementError
from lightvllm.messages import decode_reply, encode_call


class Authority:
    """A CA, and what it signs for 127.0.0.1, as PEM files in ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=None))
        self.ca = self._write(f"{name}-ca", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> list[str]:
        """Files of a new certificate, its key, and this CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key.public_key(), names).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return [self._write(f"{name}-cert", certificate), self._write(f"{name}-key", private), self.ca]

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, content: bytes) -> str:
        path = self._folder / f"{name}.pem"
        path.write_bytes(content)
        return str(path)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "group")


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return write_token(tmp_path)


@pytest.fixture
def address(authority: Authority, token_file: str) -> Iterator[str]:
    """Of a worker that listens on every address of this machine."""
    cert, key, ca = authority.issue("worker")
    tls = ("--tls-cert", cert, "--tls-key", key, "--tls-ca", ca)
    with worker_command("--listen", "0.0.0.0:0", "--token-file", token_file, *tls) as command:
        yield command.address().replace("0.0.0.0", "127.0.0.1")


def ask(address: str, token_file: str, tls: list[str], timeout: float) -> object:
    backend = KubernetesBackend((address,), token_file, *tls)
    try:
        refs = backend.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, timeout)
        return decode_reply("echo", backend.call(refs[0], *encode_call("echo", (1,), None)).result(LIMIT))
    finally:
        backend.shutdown()


def test_both_sides_of_one_group_meet(address: str, token_file: str, authority: Authority) -> None:
    assert ask(address, token_file, authority.issue("driver"), LIMIT) == 1


def test_a_driver_without_a_certificate_is_not_let_in(address: str, token_file: str) -> None:
    with pytest.raises(PlacementError, match="0 of 1 workers"):
        ask(address, token_file, [], 2.0)


def test_a_driver_of_another_group_is_not_let_in(
    address: str, token_file: str, authority: Authority, tmp_path: Path
) -> None:
    """It trusts the worker, but the worker does not know its authority."""
    cert, key, _ = Authority(tmp_path, "other").issue("stranger")
    with pytest.raises(PlacementError, match="0 of 1 workers"):
        ask(address, token_file, [cert, key, authority.ca], 2.0)


def test_a_worker_of_another_group_is_not_trusted(
    address: str, token_file: str, authority: Authority, tmp_path: Path
) -> None:
    cert, key, _ = authority.issue("driver")
    with pytest.raises(PlacementError, match=r"0 of 1 workers.*[Cc][Ee][Rr][Tt][Ii][Ff]"):
        ask(address, token_file, [cert, key, Authority(tmp_path, "other").ca], 2.0)


def test_a_certificate_does_not_replace_the_token(address: str, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(AuthError):
        ask(address, write_token(tmp_path / "other"), authority.issue("driver"), LIMIT)
