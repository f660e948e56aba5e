"""Names of a headless Service's pods and their addresses, by the cluster's DNS. Caches nothing; needs no API access.

dnspython asks, not the system's resolver: that one gives no SRV records, cannot be held to a time limit, and does not
tell a name that is not there from a name server that is silent. It also tries every search domain first where a name
has fewer dots than ``ndots`` (5 in pods), each of which may answer with a wildcard; here the one full name is asked for
that the pod's namespace and search list lead to. /etc/hosts is not read: no pod of a StatefulSet but one's own is in
it. What is cut off in UDP is asked for again by TCP; both A and AAAA records count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from lightvllm.backends.k8s.security import LAST_PORT
from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from dns.resolver import Resolver

DEFAULT_PORT = 50051
CLUSTER_DOMAIN = "cluster.local"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
PORT_NAME = "grpc"
"""What the Service calls the workers' port; its SRV records are looked for under that."""

_HEADLESS = "-headless"
_SERVER_SECONDS = 1.0  # for one name server to answer, before the next one is asked
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE = re.compile(rf"(?P<name>{_LABEL})(\.(?P<namespace>{_LABEL})(\.svc(\.(?P<domain>{_LABEL}(\.{_LABEL})*))?)?)?")
_IN_CLUSTER = re.compile(r"((?P<namespace>[^.]+)\.)?svc\.(?P<domain>.+)")  # a search domain of a pod
_LONGEST_LABEL = 63


class Unresolved(Exception):
    """No address now; the text completes "pod …"."""


class NoSuchName(Unresolved):
    """The name server says that there is no such name: there is no such pod, or its Service does not publish it yet."""


class ServiceName(msgspec.Struct, frozen=True):
    """What was given: ``NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT]``.

    Attributes:
        text: without the port. A pod is known as ``POD.text``; its certificate is for that name.
        port: of a pod's first worker.
    """

    text: str
    name: str
    namespace: str | None
    domain: str | None
    port: int

    @classmethod
    def parse(cls, given: str) -> Self:
        """Raises ConfigError."""
        text, colon, port = given.partition(":")
        match = _SERVICE.fullmatch(text.removesuffix("."))
        number = int(port) if port.isdecimal() else DEFAULT_PORT
        if match is None or (colon and not (port.isdecimal() and 1 <= number <= LAST_PORT)):
            raise ConfigError(
                f"k8s_service={given!r} is malformed; expected NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT] in lower case, "
                f"such as llm-worker{_HEADLESS}.default:{DEFAULT_PORT}"
            )
        return cls(match[0], match["name"], match["namespace"], match["domain"], number)

    @property
    def default_pod_prefix(self) -> str:
        """The StatefulSet ``llm-worker`` has the Service ``llm-worker-headless``."""
        return self.name.removesuffix(_HEADLESS)

    def full_names(self, search: Sequence[str], namespace: str | None) -> list[str]:
        """Full names that the Service may have, the likelier first.

        In a pod, and wherever namespace and domain are known, there is one.

        Args:
            search: the resolver's search list.
            namespace: of the pod that this process runs in.

        Raises:
            ConfigError: nothing says which namespace the Service is in.
        """
        clusters = list(filter(None, map(_IN_CLUSTER.fullmatch, search)))
        domains = list(dict.fromkeys(found["domain"] for found in clusters))
        namespaces = [self.namespace, namespace, *(found["namespace"] for found in clusters)]
        own = next(filter(None, namespaces), None)
        if self.domain is not None:
            return [self.text]
        if own is not None and domains:
            return [f"{self.name}.{own}.svc.{domain}" for domain in domains]
        guesses = [] if own is None else [f"{self.name}.{own}.svc.{CLUSTER_DOMAIN}"]
        guesses += [f"{self.text}.{suffix}" for suffix in search]
        if not guesses:
            raise ConfigError(
                f"k8s_service={self.text!r} names no namespace, this process runs in no pod, and the resolver has no "
                f"search list; give {self.name}.NAMESPACE"
            )
        return list(dict.fromkeys(guesses))


def check_pod_prefix(prefix: str) -> str:
    """``prefix`` as it is. Raises ConfigError for what no pod's name begins with."""
    if not re.fullmatch(_LABEL, prefix) or len(prefix) > _LONGEST_LABEL - len("-0"):
        raise ConfigError(f"k8s_pod_prefix={prefix!r}; expected a StatefulSet's name, such as llm-worker")
    return prefix


def own_namespace() -> str | None:
    """The namespace of the pod that this process runs in; None elsewhere."""
    try:
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def system_resolver() -> Resolver:
    """Asks the name servers of /etc/resolv.conf. Raises ConfigError if it names none, MissingExtra."""
    try:
        from dns.resolver import NoResolverConfiguration, Resolver
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "dns":
            raise
        raise MissingExtra("dnspython", "k8s", "k8s_service") from None
    try:
        return Resolver()
    except NoResolverConfiguration as error:
        raise ConfigError(f"k8s_service needs a name server: /etc/resolv.conf: {error}") from None


class SrvRecord(NamedTuple):
    """``pod``: the first label of the target."""

    pod: str
    port: int


class ServiceDns:
    """One headless Service, by DNS. Methods may be called from any thread.

    Attributes:
        names: the Service's full name, or those that it may have.
    """

    def __init__(self, service: ServiceName, resolver: Resolver | None = None, namespace: str | None = None) -> None:
        """``resolver`` and ``namespace``: the system's own, if they are not given.

        Raises ConfigError if the Service's namespace or the name servers cannot be told, MissingExtra.
        """
        self._resolver = resolver or system_resolver()
        self._resolver.timeout = min(self._resolver.timeout, _SERVER_SECONDS)
        suffixes = self._resolver.search or [self._resolver.domain]
        search = [text for suffix in suffixes if (text := suffix.to_text(omit_final_dot=True).lower()) not in ("", ".")]
        self.names = service.full_names(search, namespace or own_namespace())

    def addresses(self, pod: str, timeout: float) -> list[str]:
        """The pod's addresses as they are now, IPv4 first. Raises Unresolved, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        missing: Unresolved = NoSuchName("has no address yet (NXDOMAIN)")
        for service in self.names:
            try:
                return self._addresses(f"{pod}.{service}.", deadline)
            except NoSuchName:
                continue
            except Unresolved as error:
                missing = error
        raise missing

    def srv(self, timeout: float) -> list[SrvRecord]:
        """Pods and ports of the Service's port ``grpc``, by name; none if it has no such records. Raises Unresolved."""
        deadline = time.monotonic() + timeout
        for service in self.names:
            try:
                records = self._ask(f"_{PORT_NAME}._tcp.{service}.", "SRV", deadline)
            except NoSuchName:
                continue
            found = {SrvRecord(record.target.to_text().partition(".")[0].lower(), record.port) for record in records}
            if found:
                return sorted(found, key=lambda record: (_index_of(record.pod), record))
        return []

    def _addresses(self, name: str, deadline: float) -> list[str]:
        found: list[str] = []
        failure: Unresolved | None = None
        for kind in ("A", "AAAA"):
            try:
                found += [str(record.address) for record in self._ask(name, kind, deadline)]
            except NoSuchName:
                if not found:
                    raise
            except Unresolved as error:
                failure = failure or error
        if not found:
            raise failure or Unresolved("has no address yet (its name has no A or AAAA record)")
        return found

    def _ask(self, name: str, kind: str, deadline: float) -> list[Any]:
        """Records of the absolute ``name``; none if it has none of this kind. Raises Unresolved."""
        import dns.exception
        import dns.resolver

        remaining = deadline - time.monotonic()
        servers = ", ".join(map(str, self._resolver.nameservers))
        silent = Unresolved(f"cannot be looked up: no answer from name server {servers}")
        if remaining <= 0:
            raise silent
        try:
            answer = self._resolver.resolve(name, kind, lifetime=remaining, search=False, raise_on_no_answer=False)
        except dns.resolver.NXDOMAIN:
            raise NoSuchName("NXDOMAIN") from None
        except dns.exception.Timeout:
            raise silent from None
        except dns.resolver.NoNameservers as error:
            tried = error.kwargs.get("errors") or [(servers, False, 0, "no answer", None)]
            said = dict.fromkeys(f"{server}: {_plain(why)}" for server, _, _, why, _ in tried)
            raise Unresolved(f"cannot be looked up: name server {', '.join(said)}") from None
        except (dns.exception.DNSException, OSError) as error:
            raise Unresolved(f"cannot be looked up: {_plain(error)}") from None
        return list(answer.rrset or ())


def _plain(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _index_of(pod: str) -> int:
    """For an order in which pod 10 comes after pod 9."""
    index = pod.rpartition("-")[2]
    return int(index) if index.isdecimal() else -1


def disagreement(records: Sequence[SrvRecord], prefix: str, expected: range, port: int) -> str:
    """What SRV records say against the expectation, in one line; nothing if they agree, or if there are none.

    Args:
        prefix: pods are called ``prefix-index``.
        expected: the pods' indices.
        port: of each pod's first worker.
    """
    if not records:
        return ""
    by_pod = {record.pod: record.port for record in records}
    ours = {pod: by_pod[pod] for pod in by_pod if re.fullmatch(rf"{re.escape(prefix)}-\d+", pod)}
    if not ours:
        named = _few(list(by_pod))
        return f"SRV records name {named}, none of which is {prefix}-N; k8s_pod_prefix is what their names begin with"
    wanted = [f"{prefix}-{index}" for index in expected]
    said = []
    if missing := [pod for pod in wanted if pod not in ours]:
        have, need = len(wanted) - len(missing), len(wanted)
        said.append(f"SRV records name {have} of {need} pods; missing: {_few(missing)}")
    elif len(ours) > len(wanted):
        said.append(f"SRV records name {len(ours)} pods, of which this layout uses {_few(wanted)}")
    if others := sorted(set(ours.values()) - {port}):
        other = ", ".join(map(str, others))
        said.append(f"SRV records say port {other}, the workers are looked for at port {port}; put it in k8s_service")
    return "; ".join(said)


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
