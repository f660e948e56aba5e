"""Which certificate a TLS server shows."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from waiting import LIMIT


def served_serial(port: int, client: Path) -> int:
    """Serial number of the certificate that 127.0.0.1:port shows to one with the files of ``client``."""
    context = ssl.create_default_context(cafile=str(client / "ca.pem"))
    context.load_cert_chain(client / "cert.pem", client / "key.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), LIMIT) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        shown = secured.getpeercert()
    assert shown is not None
    return int(str(shown["serialNumber"]), 16)
