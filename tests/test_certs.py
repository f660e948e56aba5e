"""Certificates in memory and on disk: what is in them, by whom they are accepted, and that no key is shown."""

from __future__ import annotations

import datetime
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the k8s extra is not installed")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import DNSName, PolicyBuilder, Store, VerificationError

from lightvllm.certs import (
    CLOCK_SKEW,
    Authority,
    Certificate,
    Usage,
    general_name,
    read_certificate,
    usage_and_hosts,
    write_files,
)
from lightvllm.errors import ConfigError

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.new()


def parsed(made: Certificate) -> x509.Certificate:
    return read_certificate(made.cert)


def test_a_ca_signs_end_entities_and_nothing_else(authority: Authority) -> None:
    ca = read_certificate(authority.cert)
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert ca.issuer == ca.subject
    assert read_certificate(Authority.new().cert).subject != ca.subject, "groups can be told apart"


@pytest.mark.parametrize(
    ("usage", "purposes"), [("server", [SERVER]), ("client", [CLIENT]), ("peer", [SERVER, CLIENT])]
)
def test_a_certificate_says_what_it_is_for(authority: Authority, usage: Usage, purposes: list[object]) -> None:
    hosts = ["gpu1.example", "10.0.0.1", "[fd00::1]", "*.llm.default.svc"]
    certificate = parsed(authority.issue("gpu1", usage, hosts))
    extensions = certificate.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key_usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert key_usage.critical
    assert key_usage.value.digital_signature
    assert not key_usage.value.key_cert_sign
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu1.example", "*.llm.default.svc"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "fd00::1"]
    assert usage_and_hosts(certificate) == (usage, ["gpu1.example", "10.0.0.1", "fd00::1", "*.llm.default.svc"])
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert certificate.public_key().curve.name == "secp256r1"


def test_validity_allows_for_late_clocks_and_ends_with_the_days(authority: Authority) -> None:
    now, minute = datetime.datetime.now(datetime.UTC), datetime.timedelta(minutes=1)
    certificate = parsed(authority.issue("w", "server", ["w"], days=10))
    early = parsed(Authority.new().issue("w", "server", ["w"])).not_valid_before_utc
    assert abs(now - CLOCK_SKEW - early) < minute
    assert abs(certificate.not_valid_after_utc - now - datetime.timedelta(days=10)) < minute
    assert certificate.not_valid_before_utc >= read_certificate(authority.cert).not_valid_before_utc


def test_serial_numbers_and_keys_are_each_ones_own(authority: Authority) -> None:
    made = [authority.issue("w", "server", ["w"]) for _ in range(4)]
    assert len({certificate.serial for certificate in made}) == 4
    assert len({certificate.key for certificate in made}) == 4
    assert all(0 < certificate.serial < 2**160 for certificate in made)
    assert [certificate.serial for certificate in made] == [parsed(certificate).serial_number for certificate in made]


def test_an_independent_verifier_accepts_the_right_name_only(authority: Authority) -> None:
    leaf = parsed(authority.issue("gpu1", "server", ["gpu1.example"]))
    policy = PolicyBuilder().store(Store([read_certificate(authority.cert)]))
    assert len(policy.build_server_verifier(DNSName("gpu1.example")).verify(leaf, [])) == 2
    with pytest.raises(VerificationError):
        policy.build_server_verifier(DNSName("gpu2.example")).verify(leaf, [])
    other = PolicyBuilder().store(Store([read_certificate(Authority.new().cert)]))
    with pytest.raises(VerificationError):
        other.build_server_verifier(DNSName("gpu1.example")).verify(leaf, [])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
@pytest.mark.parametrize(
    ("usage", "purpose", "accepted"),
    [
        ("server", "sslserver", True),
        ("client", "sslclient", True),
        ("server", "sslclient", False),
        ("client", "sslserver", False),
        ("peer", "sslserver", True),
        ("peer", "sslclient", True),
    ],
)
def test_openssl_agrees(authority: Authority, tmp_path: Path, usage: Usage, purpose: str, accepted: bool) -> None:
    (tmp_path / "ca").write_bytes(authority.cert)
    (tmp_path / "leaf").write_bytes(authority.issue("w", usage, ["w"]).cert)
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca", "leaf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) is accepted, done.stderr
    if not accepted:
        assert "purpose" in done.stderr


def test_a_ca_is_loaded_again(authority: Authority) -> None:
    again = Authority.load(authority.cert, authority.key)
    leaf = parsed(again.issue("w", "server", ["w"]))
    leaf.verify_directly_issued_by(read_certificate(authority.cert))


def test_what_is_no_ca_is_refused(authority: Authority) -> None:
    leaf = authority.issue("w", "server", ["w"])
    with pytest.raises(ConfigError, match="may not sign others"):
        Authority.load(leaf.cert, leaf.key)
    with pytest.raises(ConfigError, match="not the one of its certificate"):
        Authority.load(authority.cert, leaf.key)
    with pytest.raises(ConfigError, match="expected PEM"):
        Authority.load(b"nothing", authority.key)
    with pytest.raises(ConfigError, match="cannot be read; expected PEM that is not encrypted"):
        Authority.load(authority.cert, b"nothing")


def test_no_key_is_shown(authority: Authority) -> None:
    leaf = authority.issue("w", "server", ["w"])
    for shown in (repr(authority), str(authority), repr(leaf), str(leaf)):
        assert "key hidden" in shown
        assert "PRIVATE" not in shown


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("gpu1:9000", "leave the port out: gpu1"),
        ("127.0.0.1:9000", "leave the port out: 127.0.0.1"),
        ("", "neither"),
        ("a..b", "neither"),
        ("-a.b", "neither"),
        ("a b", "neither"),
        ("127.0.1", "neither"),
        ("fe80::1%eth0", "neither"),
        ("w.*.b", "neither"),
        ("*", "neither"),
        ("x" * 64, "neither"),
        (".".join(["x" * 60] * 5), "neither"),
        ("gpü", "neither"),
    ],
)
def test_a_malformed_host_is_refused(authority: Authority, host: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        authority.issue("w", "server", [host])


def test_names_are_case_insensitive() -> None:
    assert general_name("GPU1.Example") == x509.DNSName("gpu1.example")


def test_a_server_needs_a_host_and_a_driver_none(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="needs the host names"):
        authority.issue("w", "server")
    assert usage_and_hosts(parsed(authority.issue("d", "client"))) == ("client", [])


@pytest.mark.parametrize("days", [0, -1, 36501, float("nan"), float("inf")])
def test_a_validity_that_cannot_be(authority: Authority, days: float) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        authority.issue("w", "server", ["w"], days=days)


def test_nothing_outlives_its_ca() -> None:
    with pytest.raises(ConfigError, match=r"outlive its CA.*at most 9 days"):
        Authority.new(days=9.5).issue("w", "server", ["w"], days=10)


def test_files_have_the_modes_asked_for_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_files(tmp_path / "new", {"key": (b"1", 0o600), "cert": (b"2", 0o644)})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {"key": 0o600, "cert": 0o644}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_files_are_replaced_only_when_told_to(tmp_path: Path) -> None:
    write_files(tmp_path / "f", {"b": (b"old", 0o600)})
    with pytest.raises(ConfigError, match=r"cannot write .*b: is there already"):
        write_files(tmp_path / "f", {"a": (b"new", 0o600), "b": (b"new", 0o600)})
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"b": b"old"}
    write_files(tmp_path / "f", {"a": (b"new", 0o600), "b": (b"new", 0o600)}, replace=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"a": b"new", "b": b"new"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        write_files(tmp_path / "file", {"a": (b"", 0o600)})


def test_without_cryptography_the_install_command_is_said() -> None:
    code = "import sys; sys.modules['cryptography'] = None; import lightvllm.certs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "MissingExtra: making certificates needs the package 'cryptography'" in done.stderr
    assert "pip install 'lightvllm[k8s]'" in done.stderr
