"""Who may talk to a worker: the token, certificates, and the rule for addresses. Imports no grpc.

The rule: a connection stays on this machine (Unix socket, loopback) or is mutual TLS; and every call carries the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import ssl
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lightvllm.errors import ConfigError
from lightvllm.keys import read_word

LAST_PORT = 65535
_AUTHORIZATION = "authorization"


class Token:
    """A shared secret. Its text is shown by no ``repr`` and no error."""

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def new(cls) -> Token:
        return cls(secrets.token_urlsafe(32))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Token:
        """The token in the file ``path``. Raises ConfigError if it is missing, empty, malformed or open to others."""
        return cls(read_word(path, "token file"))

    def reveal(self) -> str:
        """The text, for the bootstrap pipe of a child process and nothing else."""
        return self._text

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((_AUTHORIZATION, f"Bearer {self._text}"),)

    def matches(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether exactly one authorization is there and is this token; takes the same time wherever it differs."""
        given = [value for key, value in metadata if key == _AUTHORIZATION]
        if len(given) != 1:
            return False
        value = given[0].encode() if isinstance(given[0], str) else given[0]
        return hmac.compare_digest(value, f"Bearer {self._text}".encode())


class Tls(msgspec.Struct, frozen=True):
    """Files for mutual TLS, PEM: this side's certificate and key, and the CA that signed the other side's."""

    cert: str
    key: str
    ca: str

    @classmethod
    def from_options(cls, cert: str | None, key: str | None, ca: str | None) -> Tls | None:
        """None if no option is given; ConfigError unless all are, and can be read."""
        given = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
        if not any(given.values()):
            return None
        if missing := [name for name, value in given.items() if not value]:
            raise ConfigError(f"mutual TLS needs certificate, key and CA; missing: {', '.join(missing)}")
        tls = cls(str(cert), str(key), str(ca))
        tls.read()
        return tls

    def context(self, server: bool) -> ssl.SSLContext:
        """Mutual TLS 1.3 for sockets. Raises ConfigError for a file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.ca)
        except OSError:  # ssl.SSLError is one
            raise ConfigError(f"TLS file {self.ca}: expected a CA's certificate, PEM") from None
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ValueError, OSError):
            raise ConfigError(
                f"TLS files {self.cert} and {self.key}: expected a certificate and its key, PEM"
            ) from None
        return context

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of certificate, key and CA; read anew each time, so that a renewed certificate is used."""
        try:
            return Path(self.cert).read_bytes(), Path(self.key).read_bytes(), Path(self.ca).read_bytes()
        except OSError as error:
            raise ConfigError(f"TLS file {error.filename}: {error.strerror}") from None


def _no_password() -> str:
    """An encrypted key is an error; without this function the terminal would be asked."""
    raise ValueError("the key is encrypted")


def split_address(address: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` to host and port. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not colon or not host or not port.isdecimal() or int(port) > LAST_PORT or (":" in host and "[" not in address):
        raise ConfigError(f"address {address!r} is malformed; expected host:port, such as 127.0.0.1:9000")
    return host, int(port)


def check_address(address: str, tls: Tls | None) -> None:
    """Raise ConfigError if a token sent to ``address`` could be read on the way."""
    host, _ = split_address(address)
    if tls is None and not is_loopback(host):
        raise ConfigError(
            f"{address} is not a loopback address, so that the token would cross the network in the clear; "
            "use mutual TLS (TLS certificate, key and CA) or an address in 127.0.0.0/8"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
