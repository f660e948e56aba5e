"""Names and addresses of a headless Service's pods, asked of a real name server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dns", reason="the k8s extra is not installed")

import dns.nameserver
import dns.rcode
from dns_server import DnsServer, dns_server, srv
from waiting import LIMIT

from lightvllm.backends.k8s import names
from lightvllm.backends.k8s.names import (
    NoSuchName,
    ServiceDns,
    ServiceName,
    SrvRecord,
    Unresolved,
    check_pod_prefix,
    disagreement,
)
from lightvllm.errors import ConfigError, MissingExtra

POD_SEARCH = ("prod.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example")
FULL = "llm-headless.prod.svc.cluster.local"


@pytest.fixture
def server() -> Iterator[DnsServer]:
    with dns_server() as server:
        yield server


@pytest.fixture
def service(server: DnsServer) -> ServiceDns:
    return ServiceDns(ServiceName.parse("llm-headless"), server.resolver(*POD_SEARCH))


# ------------------------------------------------------------------------------------------------------ what is given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("llm-headless", ("llm-headless", "llm-headless", None, None, 50051)),
        ("llm-headless:9000", ("llm-headless", "llm-headless", None, None, 9000)),
        ("a.prod", ("a.prod", "a", "prod", None, 50051)),
        ("a.prod.svc:1", ("a.prod.svc", "a", "prod", None, 1)),
        ("a.prod.svc.cluster.local.", ("a.prod.svc.cluster.local", "a", "prod", "cluster.local", 50051)),
        ("a.prod.svc.k8s:65535", ("a.prod.svc.k8s", "a", "prod", "k8s", 65535)),
    ],
)
def test_a_services_name(given: str, expected: Any) -> None:
    assert ServiceName.parse(given) == ServiceName(*expected)


@pytest.mark.parametrize(
    "given",
    [
        *("", ".", ":50051", "LLM", "a_b", "-a", "a-", "a..b", "a.b.c", "a.b.svc..c", "a b", "x" * 64),
        *("a:", "a:0", "a:65536", "a:x", "a:1:2", "a:-1", "http://a", "a/b", "10.0.0.7:50051", "[::1]:50051", "a\n"),
    ],
)
def test_what_is_no_services_name(given: str) -> None:
    with pytest.raises(ConfigError, match="is malformed; expected NAME") as error:
        ServiceName.parse(given)
    assert repr(given) in str(error.value)
    assert "\n" not in str(error.value)


def test_pods_are_called_as_the_service_says() -> None:
    assert ServiceName.parse("llm-worker-headless.prod").default_pod_prefix == "llm-worker"
    assert ServiceName.parse("workers").default_pod_prefix == "workers"
    assert check_pod_prefix("llm-0") == "llm-0"
    for prefix in ("", "LLM", "llm-", "x" * 62):
        with pytest.raises(ConfigError, match="expected a StatefulSet's name"):
            check_pod_prefix(prefix)


@pytest.mark.parametrize(
    ("given", "search", "namespace", "expected"),
    [
        ("a", POD_SEARCH, "prod", ["a.prod.svc.cluster.local"]),
        ("a", POD_SEARCH, None, ["a.prod.svc.cluster.local"]),
        ("a", ("prod.svc.k8s.corp", "svc.k8s.corp"), None, ["a.prod.svc.k8s.corp"]),
        ("a.test", POD_SEARCH, "prod", ["a.test.svc.cluster.local"]),
        ("a.test.svc", POD_SEARCH, "prod", ["a.test.svc.cluster.local"]),
        ("a.test.svc.other", POD_SEARCH, "prod", ["a.test.svc.other"]),
        # The file says more than a search list that somebody has written.
        ("a", ("test.svc.cluster.local",), "prod", ["a.prod.svc.cluster.local"]),
        # No search list of a pod: the usual domain first, then whatever the resolver would try.
        ("a", (), "prod", ["a.prod.svc.cluster.local"]),
        ("a.test", ("corp.example",), None, ["a.test.svc.cluster.local", "a.test.corp.example"]),
        ("a", ("corp.example", "example"), None, ["a.corp.example", "a.example"]),
    ],
)
def test_full_names(given: str, search: tuple[str, ...], namespace: str | None, expected: list[str]) -> None:
    assert ServiceName.parse(given).full_names(search, namespace) == expected


def test_nothing_says_which_namespace() -> None:
    with pytest.raises(ConfigError, match=r"^k8s_service='a' names no namespace, .* give a\.NAMESPACE$"):
        ServiceName.parse("a").full_names((), None)


def test_the_namespace_of_this_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: DnsServer) -> None:
    monkeypatch.setattr(names, "NAMESPACE_FILE", tmp_path / "namespace")
    with pytest.raises(ConfigError, match="names no namespace"):
        ServiceDns(ServiceName.parse("a"), server.resolver())
    (tmp_path / "namespace").write_text("prod\n")
    assert ServiceDns(ServiceName.parse("a"), server.resolver()).names == ["a.prod.svc.cluster.local"]


def test_dnspython_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dns.resolver", None)
    with pytest.raises(MissingExtra, match=r"dnspython.*lightvllm\[k8s\]"):
        names.system_resolver()


# ---------------------------------------------------------------------------------------------------------- addresses


def test_a_name_comes_and_its_address_changes(server: DnsServer, service: ServiceDns) -> None:
    with pytest.raises(NoSuchName, match=r"has no address yet \(NXDOMAIN\)"):
        service.addresses("llm-3", LIMIT)
    server.set(f"llm-3.{FULL}", "A", "10.0.0.7")
    assert service.addresses("llm-3", LIMIT) == ["10.0.0.7"]
    server.set(f"llm-3.{FULL}", "A", "10.0.0.9")
    assert service.addresses("llm-3", LIMIT) == ["10.0.0.9"], "nothing is kept, whatever the answer's TTL"
    server.remove(f"llm-3.{FULL}")
    with pytest.raises(NoSuchName):
        service.addresses("llm-3", LIMIT)


def test_one_name_is_asked_for_and_no_search_domain(server: DnsServer, service: ServiceDns) -> None:
    server.set(f"llm-0.{FULL}.corp.example", "A", "192.0.2.1")  # as a wildcard of the company's would
    with pytest.raises(NoSuchName):
        service.addresses("llm-0", LIMIT)
    assert [name for name, *_ in server.asked] == [f"llm-0.{FULL}"]


def test_both_families(server: DnsServer, service: ServiceDns) -> None:
    server.set(f"llm-0.{FULL}", "AAAA", "fd00::7")
    assert service.addresses("llm-0", LIMIT) == ["fd00::7"]
    server.set(f"llm-0.{FULL}", "A", "10.0.0.7")
    assert service.addresses("llm-0", LIMIT) == ["10.0.0.7", "fd00::7"]
    server.remove(f"llm-0.{FULL}")
    server.set(f"llm-0.{FULL}", "TXT")
    with pytest.raises(Unresolved, match=r"^has no address yet \(its name has no A or AAAA record\)$") as error:
        service.addresses("llm-0", LIMIT)
    assert not isinstance(error.value, NoSuchName)


def test_guesses_are_tried_in_order(server: DnsServer) -> None:
    service = ServiceDns(ServiceName.parse("a.test"), server.resolver("one.example", "two.example"))
    server.set("a-0.a.test.two.example", "A", "10.0.0.7")
    assert service.addresses("a-0", LIMIT) == ["10.0.0.7"]
    assert list(dict.fromkeys(name for name, *_ in server.asked)) == [
        *("a-0.a.test.svc.cluster.local", "a-0.a.test.one.example", "a-0.a.test.two.example")
    ]


def test_what_does_not_fit_is_asked_for_by_tcp(server: DnsServer, service: ServiceDns) -> None:
    server.truncate = True
    server.set(f"llm-0.{FULL}", "A", "10.0.0.7")
    assert service.addresses("llm-0", LIMIT) == ["10.0.0.7"]
    assert {protocol for _, _, protocol in server.asked} == {"udp", "tcp"}


def test_a_silent_name_server(server: DnsServer, service: ServiceDns) -> None:
    server.silent = True
    started = time.monotonic()
    with pytest.raises(Unresolved, match=r"^cannot be looked up: no answer from name server 127\.0\.0\.1$"):
        service.addresses("llm-0", 0.3)
    assert time.monotonic() - started < LIMIT / 2


def test_a_name_server_that_cannot(server: DnsServer, service: ServiceDns) -> None:
    server.rcode = dns.rcode.SERVFAIL
    with pytest.raises(Unresolved, match=r"^cannot be looked up: .*127\.0\.0\.1.*SERVFAIL"):
        service.addresses("llm-0", 2)
    server.rcode = dns.rcode.REFUSED
    with pytest.raises(Unresolved, match=r"^cannot be looked up: .*127\.0\.0\.1.*REFUSED"):
        service.srv(2)


def test_no_name_server_listens() -> None:
    with dns_server() as server:
        resolver = server.resolver(*POD_SEARCH)
    with pytest.raises(Unresolved, match=r"^cannot be looked up: .*127\.0\.0\.1") as error:
        ServiceDns(ServiceName.parse("llm-headless"), resolver).addresses("llm-0", 1)
    assert "\n" not in str(error.value)


def test_the_second_name_server_is_asked(server: DnsServer) -> None:
    with dns_server() as silent:
        silent.silent = True
        server.set(f"llm-0.{FULL}", "A", "10.0.0.7")
        resolver = server.resolver(*POD_SEARCH)
        resolver.nameservers = [dns.nameserver.Do53Nameserver("127.0.0.1", each.port) for each in (silent, server)]
        service = ServiceDns(ServiceName.parse("llm-headless"), resolver)
        assert service.addresses("llm-0", LIMIT) == ["10.0.0.7"]


# ---------------------------------------------------------------------------------------------------------------- SRV


def test_srv_records(server: DnsServer, service: ServiceDns) -> None:
    assert service.srv(LIMIT) == []
    server.set(f"_grpc._tcp.{FULL}", "SRV", *srv(50051, *(f"llm-{index}.{FULL}" for index in (10, 0, 9))))
    server.truncate = True
    assert service.srv(LIMIT) == [SrvRecord("llm-0", 50051), SrvRecord("llm-9", 50051), SrvRecord("llm-10", 50051)]
    server.silent = True
    with pytest.raises(Unresolved, match="no answer"):
        service.srv(0.3)


def records(*pods: str, port: int = 50051) -> list[SrvRecord]:
    return [SrvRecord(pod, port) for pod in pods]


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ([], range(4), ""),
        (records("llm-0", "llm-1"), range(2), ""),
        (records("llm-0", "llm-1"), range(3), "SRV records name 2 of 3 pods; missing: llm-2"),
        (records("llm-1"), range(7), "SRV records name 1 of 7 pods; missing: llm-0, llm-2, llm-3, llm-4 and 2 more"),
        (
            records("llm-0", "llm-1", "llm-2"),
            range(2),
            "SRV records name 3 pods, of which this layout uses llm-0, llm-1",
        ),
        (
            records("llm-0", "llm-1", port=9000),
            range(2),
            "SRV records say port 9000, the workers are looked for at port 50051; put it in k8s_service",
        ),
        (
            records("vllm-0", "vllm-1"),
            range(2),
            "SRV records name vllm-0, vllm-1, none of which is llm-N; k8s_pod_prefix is what their names begin with",
        ),
        (records("llm-0", "llm-web-0"), range(1), ""),
        (records("llm-2", "llm-3"), range(2, 4), ""),
        (
            records("llm-2", "llm-3", port=1),
            range(2, 5),
            "SRV records name 2 of 3 pods; missing: llm-4; SRV records say ",
        ),
    ],
)
def test_what_srv_records_say_against_the_layout(found: list[SrvRecord], expected: range, said: str) -> None:
    assert disagreement(found, "llm", expected, 50051).startswith(said)
    assert bool(disagreement(found, "llm", expected, 50051)) == bool(said)
