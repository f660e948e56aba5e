"""A name server on loopback, UDP and TCP, whose answers a test changes as it goes; and a resolver that asks it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.rrset

TTL = 30  # seconds, as CoreDNS has it; nobody here may keep an answer for so long


class DnsServer:
    """Use by ``dns_server``. What it is told holds from the next question on.

    Attributes:
        silent: whether questions are left without an answer.
        truncate: whether answers by UDP are cut off.
        rcode: answers every question, if it is not NOERROR.
        asked: each question as (name, type, "udp" or "tcp").
    """

    def __init__(self, udp: socket.socket, tcp: socket.socket) -> None:
        self._udp, self._tcp = udp, tcp
        self.port: int = udp.getsockname()[1]
        self._records: dict[tuple[str, str], list[str]] = {}
        self.silent = False
        self.truncate = False
        self.rcode = dns.rcode.NOERROR
        self.asked: list[tuple[str, str, str]] = []
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._serve_udp, self._serve_tcp)]

    def set(self, name: str, kind: str, *values: str) -> None:
        """The records of this name and type are these; with none, the name is known all the same."""
        self._records = {**self._records, (name, kind): list(values)}  # anew: the threads may be reading the old one

    def remove(self, name: str) -> None:
        """There is no such name from now on."""
        self._records = {key: values for key, values in self._records.items() if key[0] != name}

    def resolver(self, *search: str) -> dns.resolver.Resolver:
        """Asks this server; with this search list."""
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], self.port
        resolver.search = [dns.name.from_text(suffix) for suffix in search]
        resolver.domain = dns.name.root
        return resolver

    def _answer(self, wire: bytes, protocol: str) -> bytes | None:
        query = dns.message.from_wire(wire)
        (question,) = query.question
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind, protocol))
        if self.silent:
            return None
        response = dns.message.make_response(query)
        now = self._records
        records, known = now.get((name, kind)), {each for each, _ in now}
        if self.rcode != dns.rcode.NOERROR:
            response.set_rcode(self.rcode)
        elif self.truncate and protocol == "udp":
            response.flags |= dns.flags.TC
        elif records:
            response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", kind, *records))
        elif name not in known:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()

    def _serve_udp(self) -> None:
        while True:
            try:
                wire, client = self._udp.recvfrom(65535)
            except OSError:  # closed
                return
            if not wire:  # from close()
                return
            if answer := self._answer(wire, "udp"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    self._udp.sendto(answer, client)

    def _serve_tcp(self) -> None:
        while True:
            try:
                connection, _ = self._tcp.accept()
            except OSError:  # closed
                return
            with contextlib.suppress(ConnectionError), connection, connection.makefile("rwb") as stream:
                if len(head := stream.read(2)) < 2:
                    continue
                if answer := self._answer(stream.read(struct.unpack("!H", head)[0]), "tcp"):
                    stream.write(struct.pack("!H", len(answer)) + answer)

    def close(self) -> None:
        for sock in (self._udp, self._tcp):
            with contextlib.suppress(OSError):  # not connected; it wakes who waits there all the same
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def dns_server() -> Iterator[DnsServer]:
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(tcp.getsockname())
        server = DnsServer(udp, tcp)
        for thread in server.threads:
            thread.start()
        stack.callback(server.close)
        yield server


def srv(port: int, *targets: str) -> Sequence[str]:
    """SRV records as CoreDNS makes them for a headless Service."""
    return [f"0 50 {port} {target}." for target in targets]
