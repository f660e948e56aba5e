"""gRPC's server credentials from files that may be renewed while the server runs. Used by ``wire`` and nothing else.

A worker server may wait for its driver for longer than its certificate is valid; so the files are looked at before
every handshake, and new ones are used from then on. Connections that stand are not touched.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import grpc

from lightvllm.backends.k8s.security import Tls
from lightvllm.errors import ConfigError

logger = logging.getLogger(__name__)


def server_credentials(tls: Tls) -> Any:
    """Mutual TLS: clients must show a certificate of the group's CA. Raises ConfigError for files that cannot be used.

    Files that cannot be used later, such as a key that is not yet the new certificate's, are logged, and what was used
    before stays in use.
    """
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(files.first, files.renewed, require_client_authentication=True)


class _Files:
    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()  # handshakes run on several of gRPC's threads
        self._contents = tls.read()
        self._refused: tuple[bytes, bytes, bytes] | None = None
        _check(tls, self._contents)
        self.first = _configuration(*self._contents)

    def renewed(self) -> Any:
        """The new configuration, or None to go on with the present one; called by gRPC before each handshake."""
        with self._lock:
            try:
                contents = self._tls.read()
                if contents in (self._contents, self._refused):
                    return None
                self._refused = contents
                _check(self._tls, contents)
            except ConfigError as error:
                logger.warning("the renewed TLS files are not used: %s", error)
                return None
            self._contents, self._refused = contents, None
            return _configuration(*contents)


def _configuration(cert: bytes, key: bytes, ca: bytes) -> Any:
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _check(tls: Tls, contents: tuple[bytes, bytes, bytes]) -> None:
    """Raise ConfigError unless ``contents`` are a certificate, its key, and a CA: gRPC would not say what is wrong.

    The library reads certificate and key from their files, so these must still hold ``contents`` afterwards.
    """
    tls.context(server=True)
    if tls.read() != contents:
        raise ConfigError(f"TLS files {tls.cert} and {tls.key} are being replaced; try again")
