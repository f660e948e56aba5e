"""Server credentials from files: a renewed certificate is used for the next connection, a broken one never."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")
pytest.importorskip("cryptography", reason="the k8s extra is not installed")

import grpc
from tls_probe import served_serial
from waiting import LIMIT, wait_until

from lightvllm.backends.k8s.credentials import server_credentials
from lightvllm.backends.k8s.security import Tls
from lightvllm.certs import Authority, Certificate, write_files
from lightvllm.errors import ConfigError


class Group:
    """A CA, with the files of one worker and one driver."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.new()
        self.worker, self.driver = folder / "worker", folder / "driver"
        self.tls = Tls(*(str(self.worker / f"{name}.pem") for name in ("cert", "key", "ca")))
        self.first = self.renew()
        self.write(self.driver, self.authority.issue("d", "client"))

    def issue(self) -> Certificate:
        return self.authority.issue("w", "server", ["127.0.0.1"])

    def write(self, folder: Path, certificate: Certificate) -> None:
        files = {"cert.pem": certificate.cert, "key.pem": certificate.key, "ca.pem": self.authority.cert}
        write_files(folder, {name: (content, 0o600) for name, content in files.items()}, replace=True)

    def renew(self) -> int:
        made = self.issue()
        self.write(self.worker, made)
        return made.serial


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


@pytest.fixture
def port(group: Group) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(group.tls))
    server.start()
    yield port
    server.stop(None).wait(LIMIT)


def test_a_renewed_certificate_is_used_for_the_next_connection(group: Group, port: int) -> None:
    assert [served_serial(port, group.driver) for _ in range(2)] == [group.first] * 2
    second = group.renew()
    assert second != group.first
    assert [served_serial(port, group.driver) for _ in range(2)] == [second] * 2


def test_a_half_renewed_pair_is_not_used_until_it_is_whole(
    group: Group, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    new = group.issue()
    with caplog.at_level(logging.WARNING):
        (group.worker / "key.pem").write_bytes(new.key)
        assert [served_serial(port, group.driver) for _ in range(3)] == [group.first] * 3
        (said,) = [record.message for record in caplog.records]
    assert said.startswith("the renewed TLS files are not used: TLS files ")
    assert "PRIVATE KEY" not in said
    (group.worker / "cert.pem").write_bytes(new.cert)
    assert served_serial(port, group.driver) == new.serial


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
def test_a_file_that_is_gone_changes_nothing(group: Group, port: int, name: str) -> None:
    (group.worker / name).unlink()
    assert served_serial(port, group.driver) == group.first


def call(port: int, driver: Path) -> grpc.RpcError:
    """How a call of a method that is not there ends: UNIMPLEMENTED for a driver that is let in."""
    cert, key, ca = ((driver / f"{name}.pem").read_bytes() for name in ("cert", "key", "ca"))
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(ca, key, cert)) as channel:
        with pytest.raises(grpc.RpcError) as answer:
            channel.unary_unary("/no/such")(b"", timeout=LIMIT)
        return answer.value


def test_a_renewed_ca_decides_who_is_let_in(group: Group, port: int, tmp_path: Path) -> None:
    assert call(port, group.driver).code() is grpc.StatusCode.UNIMPLEMENTED
    (tmp_path / "other").mkdir()
    other = Group(tmp_path / "other")
    write_files(group.worker, {path.name: (path.read_bytes(), 0o600) for path in other.worker.iterdir()}, replace=True)
    assert call(port, other.driver).code() is grpc.StatusCode.UNIMPLEMENTED
    assert call(port, group.driver).code() is grpc.StatusCode.UNAVAILABLE


def test_what_has_expired_is_refused_on_both_sides(group: Group, port: int) -> None:
    second = 1 / 86400
    driver = group.authority.issue("d", "client", days=second)
    worker = group.authority.issue("w", "server", ["127.0.0.1"], days=second)
    end = max(driver.not_after, worker.not_after)
    wait_until(lambda: datetime.datetime.now(datetime.UTC) > end + datetime.timedelta(seconds=1), "their end")
    group.write(group.driver.with_name("late"), driver)
    assert call(port, group.driver.with_name("late")).code() is grpc.StatusCode.UNAVAILABLE
    assert call(port, group.driver).code() is grpc.StatusCode.UNIMPLEMENTED
    group.write(group.worker, worker)
    assert "certificate has expired" in str(call(port, group.driver).details())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cert.pem", b"", "expected a certificate and its key, PEM"),
        ("key.pem", b"nothing", "expected a certificate and its key, PEM"),
        ("ca.pem", b"nothing", "expected a CA's certificate, PEM"),
        ("ca.pem", b"\xff", "expected a CA's certificate, PEM"),
    ],
)
def test_files_that_cannot_be_used_are_an_error_at_the_start(
    group: Group, name: str, content: bytes, message: str
) -> None:
    (group.worker / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        server_credentials(group.tls)


def test_another_ones_key_is_an_error_at_the_start(group: Group) -> None:
    (group.worker / "key.pem").write_bytes((group.driver / "key.pem").read_bytes())
    with pytest.raises(ConfigError, match="expected a certificate and its key"):
        server_credentials(group.tls)


def test_an_encrypted_key_is_an_error_and_asks_nobody(group: Group) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((group.worker / "key.pem").read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    (group.worker / "key.pem").write_bytes(encrypted)
    with pytest.raises(ConfigError, match="expected a certificate and its key"):
        server_credentials(group.tls)
