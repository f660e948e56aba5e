"""X.509 certificates for mutual TLS within one group of workers: a CA of the group's own, and what it signs.

Pure: PEM bytes in memory; ``write_files`` puts them on disk. Opens no connection and knows neither gRPC nor the
command line. Any module may import it; it needs the package ``cryptography`` (the k8s extra) and raises MissingExtra
where that is absent, so import it where it is used.

Profile (RFC 5280): ECDSA P-256 with SHA-256, random serial numbers, key identifiers on everything. The CA may sign
end entities only (path length 0). An end entity's extended key usage says what it may be used for: a worker's
certificate does not pass as a driver's.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from lightvllm.errors import ConfigError, MissingExtra

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "cryptography":
        raise
    raise MissingExtra("cryptography", "k8s", "making certificates") from None

CLOCK_SKEW = datetime.timedelta(hours=1)
"""Certificates are valid from this long before they are made, for machines whose clocks are late."""

DAYS = 365
"""Default validity of an end entity's certificate."""

CA_DAYS = 3650
"""Default validity of a CA's."""

Usage = Literal["server", "client", "peer"]
"""Whom a certificate proves: one who is connected to, one who connects, or one who does both."""

_PURPOSES = {
    "server": [ExtendedKeyUsageOID.SERVER_AUTH],
    "client": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "peer": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}
_COMMON_NAME_CHARACTERS = 64  # RFC 5280, ub-common-name
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_DNS_NAME = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}")


class Certificate:
    """A certificate and its private key. The key is shown by no ``repr``.

    Attributes:
        cert: the certificate, PEM.
        key: its private key, PEM (PKCS #8, not encrypted).
        not_after: the end of its validity, UTC.
        serial: its serial number.
    """

    def __init__(self, cert: bytes, key: bytes, not_after: datetime.datetime, serial: int) -> None:
        self.cert = cert
        self.key = key
        self.not_after = not_after
        self.serial = serial

    def __repr__(self) -> str:
        return f"{type(self).__name__}(serial={self.serial:x}, until={self.not_after:%Y-%m-%d}, key hidden)"


class Authority:
    """The CA of one group.

    Attributes:
        cert: its certificate, PEM: what every member trusts.
        not_after: the end of its validity, UTC.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        """Use ``new`` or ``load``."""
        self._certificate = certificate
        self._key = key
        self.cert = certificate.public_bytes(serialization.Encoding.PEM)
        self.not_after = certificate.not_valid_after_utc

    def __repr__(self) -> str:
        return f"Authority({self._certificate.subject.rfc4514_string()}, until={self.not_after:%Y-%m-%d}, key hidden)"

    @classmethod
    def new(cls, days: float = CA_DAYS) -> Authority:
        """A CA with a new key and a name that no other has, valid for ``days`` from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"lightvllm group {secrets.token_hex(8)}")
        now = _now()
        public = key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(_end(now, days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, cert: bytes, key: bytes) -> Authority:
        """The CA that ``cert`` and ``key`` (PEM) are of. Raises ConfigError, which quotes neither."""
        certificate = read_certificate(cert)
        try:
            private = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError("the CA's key cannot be read; expected PEM that is not encrypted") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != certificate.public_key():
            raise ConfigError("the CA's key is not the one of its certificate")
        try:
            is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            raise ConfigError("this certificate is no CA's: it may not sign others")
        return cls(certificate, private)

    @property
    def key(self) -> bytes:
        """Its private key, PEM (PKCS #8, not encrypted): whoever has it can join the group in any role."""
        return _private_bytes(self._key)

    def issue(self, name: str, usage: Usage, hosts: Iterable[str] = (), days: float = DAYS) -> Certificate:
        """A new key and a certificate for it, valid for ``days`` from now.

        Args:
            name: the subject's common name, for people who read it; cut after 64 characters. Nothing checks it.
            usage: a ``server`` is a worker, a ``client`` a driver, a ``peer`` both.
            hosts: DNS names (``*.`` may stand for one label) and IP addresses under which it is connected to. Needed
                but for a client.

        Raises:
            ConfigError: no host, a malformed one, or the CA's validity ends before ``days`` are over.
        """
        names = [general_name(host) for host in dict.fromkeys(hosts)]
        if not names and usage != "client":
            raise ConfigError(f"the certificate of {name} needs the host names or IP addresses that it is reached at")
        now = _now()
        end = _end(now, days)
        if end > self.not_after:
            left = max(0, (self.not_after - now).days)
            raise ConfigError(
                f"a certificate for {days:g} days would outlive its CA, which ends on {self.not_after:%Y-%m-%d}; "
                f"ask for at most {left} days, or make a new CA"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - CLOCK_SKEW, self._certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_PURPOSES[usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Certificate(
            certificate.public_bytes(serialization.Encoding.PEM), _private_bytes(key), end, certificate.serial_number
        )


def general_name(host: str) -> x509.GeneralName:
    """``host`` as a certificate names it: an IP address (brackets allowed) or a DNS name. Raises ConfigError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    with contextlib.suppress(ValueError):
        if "%" not in bare:  # a zone means something on one machine only
            return x509.IPAddress(ipaddress.ip_address(bare))
    name = host.lower()
    last = name.rpartition(".")[2]
    if not _DNS_NAME.fullmatch(name) or len(name) > 253 or last.isdecimal():
        port = re.fullmatch(r"(.+):\d+", host)
        hint = f"; leave the port out: {port[1]}" if port else ""
        raise ConfigError(f"{host!r} is neither a DNS name nor an IP address{hint}")
    return x509.DNSName(name)


def read_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate in ``pem``. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError("the certificate cannot be read; expected PEM") from None


def usage_and_hosts(certificate: x509.Certificate) -> tuple[Usage, list[str]]:
    """What ``Authority.issue`` was told when it made ``certificate``. Raises ConfigError for one it did not make."""
    try:
        purposes = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        purposes = []
    usages: list[Usage] = ["server", "client", "peer"]
    usage = next((usage for usage in usages if _PURPOSES[usage] == purposes), None)
    if usage is None:
        raise ConfigError("the certificate's extended key usage is not one of ours")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return usage, []
    return usage, [str(name.value) for name in names]


def write_files(folder: Path, files: Mapping[str, tuple[bytes, int]], replace: bool = False) -> None:
    """Write ``{name: (content, mode)}`` into ``folder``, which is made with mode 0700 if it is missing.

    All are written under other names first, so that with ``replace`` a reader meets a whole file, old or new. Without
    it, a file that is there already is an error and nothing has been written.
    Raises ConfigError with the system's reason.
    """
    waiting: dict[Path, Path] = {}
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, (content, mode) in files.items():
            target = folder / name
            if not replace and os.path.lexists(target):
                raise FileExistsError(17, "is there already", str(target))
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            waiting[temporary] = target
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)  # whatever the umask is
                file.write(content)
                file.flush()
                os.fsync(descriptor)
        for temporary, target in waiting.items():
            if replace:
                temporary.replace(target)
            else:
                os.link(temporary, target)  # fails, unlike a rename, if another process was faster
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    finally:
        for temporary in waiting:
            temporary.unlink(missing_ok=True)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:_COMMON_NAME_CHARACTERS])])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)  # X.509 knows whole seconds


def _end(now: datetime.datetime, days: float) -> datetime.datetime:
    if not 0 < days <= 36500:
        raise ConfigError(f"a validity of {days:g} days cannot be; expected more than 0 and at most 36500")
    return now + datetime.timedelta(seconds=max(1, int(days * 86400)))


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
