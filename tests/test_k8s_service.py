"""Workers found by the DNS of a headless Service: real servers with certificates for their pods' names, and a real name
server on loopback, where each pod has an address of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import tiny_llama
from dns_server import DnsServer, dns_server, srv
from k8s_servers import WORKER, WorkerCommand, free_ports, worker_command, write_token
from waiting import LIMIT

from lightvllm.backends.base import Backend, Placement, WorkerRef
from lightvllm.backends.k8s import names
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.certs import Authority, write_files
from lightvllm.cli.main import main
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, PlacementError
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.graph import InputNode
from lightvllm.messages import decode_reply, encode_call

FULL = "llm-headless.prod.svc.cluster.local"
SEARCH = ("prod.svc.cluster.local", "svc.cluster.local", "cluster.local")
TWO = Placement(world_size=2, worker_class=WORKER)


class Cluster:
    """A StatefulSet ``llm`` behind the Service ``llm-headless``, as far as a driver can see it.

    Attributes:
        port: of every pod's first worker.
        driver: options of KubernetesBackend: token and certificates.
    """

    def __init__(self, folder: Path, dns: DnsServer, stack: contextlib.ExitStack) -> None:
        self.dns, self.port = dns, free_ports(4)
        self._folder, self._stack = folder, stack
        self._authority = Authority.new()
        self._token = write_token(folder)
        self.driver = {"token_file": self._token} | {
            f"tls_{name}": path for name, path in self._files("driver", "client").items()
        }

    def _files(self, name: str, usage: Any, *hosts: str) -> dict[str, str]:
        issued = self._authority.issue(name, usage, hosts)
        contents = {"cert": issued.cert, "key": issued.key, "ca": self._authority.cert}
        write_files(self._folder / name, {f"{each}.pem": (text, 0o600) for each, text in contents.items()})
        return {each: str(self._folder / name / f"{each}.pem") for each in contents}

    def start(self, pod: str, host: str, *options: str) -> WorkerCommand:
        """The pod's servers, at an address that no name leads to yet."""
        tls = self._files(f"{pod}-{host.replace(':', '')}", "server", f"{pod}.llm-headless")
        files = [text for name, path in tls.items() for text in (f"--tls-{name}", path)]
        listen = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        return self._stack.enter_context(
            worker_command("--listen", listen, "--token-file", self._token, *files, *options)
        )

    def name(self, pod: str, *hosts: str) -> None:
        """The pod's addresses from now on; none and there is no such name."""
        self.dns.remove(f"{pod}.{FULL}")
        if hosts:
            kind = "AAAA" if ":" in hosts[0] else "A"
            self.dns.set(f"{pod}.{FULL}", kind, *hosts)

    def records(self, *pods: str, port: int | None = None) -> None:
        self.dns.set(f"_grpc._tcp.{FULL}", "SRV", *srv(port or self.port, *(f"{pod}.{FULL}" for pod in pods)))

    def backend(self, service: str = "llm-headless", **options: Any) -> KubernetesBackend:
        given = f"{service}:{self.port}"
        backend = KubernetesBackend(service=given, resolver=self.dns.resolver(*SEARCH), **{**self.driver, **options})
        self._stack.callback(backend.shutdown)
        return backend


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path, stack.enter_context(dns_server()), stack)


def ignore(*_: object) -> None:
    """No failure is expected."""


def ask(backend: Backend, worker: WorkerRef, method: str, *args: object) -> Any:
    return decode_reply(method, backend.call(worker, *encode_call(method, args, None)).result(LIMIT))


class Progress:
    """What ``place`` says; ``when`` has something done, once, as soon as a text holds some words."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def when(self, words: str, then: Callable[[], object]) -> None:
        self._steps.append((words, then))

    def __call__(self, text: str) -> None:
        self.said.append(text)
        if self._steps and self._steps[0][0] in text:
            self._steps.pop(0)[1]()

    def check(self) -> None:
        assert self._steps == [], self.said


@pytest.mark.parametrize("transport", ["direct", "grpc"])
def test_pods_are_found_by_their_names(cluster: Cluster, transport: Any) -> None:
    servers = [cluster.start(f"llm-{index}", f"127.0.0.{index + 2}") for index in range(2)]
    for index in range(2):
        cluster.name(f"llm-{index}", f"127.0.0.{index + 2}")
    cluster.records("llm-0", "llm-1")
    progress = Progress()
    backend = cluster.backend(transport=transport)
    refs = backend.place(TWO, ignore, LIMIT, progress)
    assert progress.said[0] == f"workers: pods llm-0 to llm-1 of headless Service {FULL}, by DNS, port {cluster.port}"
    assert "workers 2/2 ready" in progress.said, "the SRV records agree"
    assert [(ref.id, ref.index, ref.address) for ref in refs] == [
        (f"llm-{index}", index, f"llm-{index}.llm-headless:{cluster.port}") for index in range(2)
    ]
    assert [ask(backend, ref, "pid") for ref in refs] == [server.server_pid() for server in servers]
    assert set(backend.carriers.values()) == {transport}


def test_a_pod_comes_late_and_elsewhere(cluster: Cluster) -> None:
    """No name, then an address where nobody listens, then after its restart another one."""
    for index, host in enumerate(("127.0.0.2", "127.0.0.4")):
        cluster.start(f"llm-{index}", host).address()
    cluster.name("llm-0", "127.0.0.2")
    progress = Progress()
    progress.when("llm-1 has no address yet (NXDOMAIN)", lambda: cluster.name("llm-1", "127.0.0.3"))
    progress.when("llm-1 127.0.0.3: ", lambda: cluster.name("llm-1", "127.0.0.4"))
    backend = cluster.backend()
    refs = backend.place(TWO, ignore, LIMIT, progress)
    progress.check()
    assert any("127.0.0.3" in text and "refused" in text for text in progress.said), progress.said
    assert ask(backend, refs[1], "echo", 1) == 1


def test_a_restarted_pod_is_found_again_by_the_next_driver(cluster: Cluster) -> None:
    cluster.start("llm-0", "127.0.0.2").address()
    cluster.name("llm-0", "127.0.0.2")
    one = Placement(world_size=1, worker_class=WORKER)
    first = cluster.backend()
    first.place(one, ignore, LIMIT)
    first.shutdown()
    restarted = cluster.start("llm-0", "127.0.0.3")
    restarted.address()
    cluster.name("llm-0", "127.0.0.3")
    second = cluster.backend()
    (ref,) = second.place(one, ignore, LIMIT)
    assert ask(second, ref, "pid") == restarted.server_pid()


def test_a_pod_that_is_taken_is_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a server that is named by its address: its driver may have gone with its node."""
    monkeypatch.setattr("lightvllm.backends.k8s.session._BUSY_SECONDS", 0.0)
    cluster.start("llm-0", "127.0.0.2").address()
    cluster.name("llm-0", "127.0.0.2")
    one = Placement(world_size=1, worker_class=WORKER)
    first, second = cluster.backend(), cluster.backend()
    first.place(one, ignore, LIMIT)
    progress = Progress()
    progress.when("another driver", first.shutdown)
    (ref,) = second.place(one, ignore, LIMIT, progress)
    progress.check()
    assert ask(second, ref, "echo", 1) == 1


def test_several_workers_in_each_pod(cluster: Cluster) -> None:
    servers = {}
    for index in range(2):
        servers[index] = cluster.start(f"llm-{index}", f"127.0.0.{index + 2}", "--workers", "2")
        cluster.name(f"llm-{index}", f"127.0.0.{index + 2}")
    progress = Progress()
    backend = cluster.backend(gpus_per_pod=2)
    refs = backend.place(Placement(world_size=4, worker_class=WORKER), ignore, LIMIT, progress)
    assert progress.said[0].endswith(f"port {cluster.port}, 2 workers in each")
    assert [ref.id for ref in refs] == [
        f"llm-{pod}:{port}" for pod in range(2) for port in (cluster.port, cluster.port + 1)
    ]
    pids = [ask(backend, ref, "pid") for ref in refs]
    assert len(set(pids)) == 4
    for index, server in servers.items():
        assert {server.server_pid(1), server.server_pid(2)} == set(pids[2 * index : 2 * index + 2])


def test_a_graph_links_the_pods_to_each_other(cluster: Cluster) -> None:
    """By the addresses that the driver has found: the pods need not look up each other's names."""
    for index in range(2):
        cluster.start(f"llm-{index}", f"127.0.0.{index + 2}")
        cluster.name(f"llm-{index}", f"127.0.0.{index + 2}")
    executor = DistributedExecutor(
        cluster.backend(), TWO, ParallelConfig(tensor_parallel_size=2), start_timeout=LIMIT, rpc_timeout=LIMIT
    )
    try:
        one, two = executor.handles
        with InputNode() as value:
            node = one.echo.bind(two.echo.bind(value))
        graph = node.experimental_compile()
        assert [graph.execute(number).get(LIMIT) for number in range(3)] == [0, 1, 2]
    finally:
        executor.shutdown()


def test_a_pod_that_dies_is_named(cluster: Cluster) -> None:
    server = cluster.start("llm-0", "127.0.0.2")
    cluster.name("llm-0", "127.0.0.2")
    died: list[tuple[str, str]] = []
    noticed = threading.Event()

    def on_failure(worker: WorkerRef, error: Exception) -> None:
        died.append((worker.id, str(error)))
        noticed.set()

    cluster.backend().place(Placement(world_size=1, worker_class=WORKER), on_failure, LIMIT)
    os.kill(server.server_pid(), signal.SIGKILL)
    assert noticed.wait(LIMIT)
    ((worker, said),) = died
    assert worker == "llm-0"
    assert "llm-0" in said


def test_another_group_uses_the_pods_that_follow(cluster: Cluster) -> None:
    """As vLLM's data-parallel engines do."""
    cluster.start("llm-3", "127.0.0.5")
    cluster.name("llm-3", "127.0.0.5")
    (ref,) = cluster.backend(first_pod=3).place(Placement(world_size=1, worker_class=WORKER), ignore, LIMIT)
    assert (ref.id, ref.index) == ("llm-3", 0)


def test_both_families_are_tried(cluster: Cluster) -> None:
    """The server listens on IPv6 only, and the name has an IPv4 address, too."""
    cluster.start("llm-0", "::1").address()
    cluster.name("llm-0", "::1")
    cluster.dns.set(f"llm-0.{FULL}", "A", "127.0.0.9")
    backend = cluster.backend()
    (ref,) = backend.place(Placement(world_size=1, worker_class=WORKER), ignore, LIMIT)
    assert ask(backend, ref, "echo", 1) == 1
    assert backend.carriers == {"llm-0": "direct"}


def test_a_name_that_leads_to_another_pod(cluster: Cluster) -> None:
    """An old address is another pod's by now: its certificate tells."""
    cluster.start("llm-7", "127.0.0.2").address()
    cluster.start("llm-0", "127.0.0.3").address()
    cluster.name("llm-0", "127.0.0.2")
    progress = Progress()
    progress.when("llm-0 127.0.0.2: ", lambda: cluster.name("llm-0", "127.0.0.3"))
    backend = cluster.backend()
    (ref,) = backend.place(Placement(world_size=1, worker_class=WORKER), ignore, LIMIT, progress)
    progress.check()
    assert ask(backend, ref, "echo", 1) == 1


def test_who_is_missing_and_what_to_look_at(cluster: Cluster) -> None:
    cluster.start("llm-0", "127.0.0.2").address()
    cluster.name("llm-0", "127.0.0.2")
    cluster.name("llm-1", "127.0.0.3")
    cluster.records("llm-0", "llm-1")
    progress = Progress()
    with pytest.raises(PlacementError) as error:
        cluster.backend().place(Placement(world_size=3, worker_class=WORKER), ignore, 4, progress)
    said = str(error.value)
    assert said.startswith("1 of 3 workers ready within 4 s; llm-1 127.0.0.3: ")
    assert "refused" in said
    assert "llm-2 has no address yet (NXDOMAIN); SRV records name 2 of 3 pods; missing: llm-2; " in said
    assert (
        f"there is no name llm-2.{FULL}: is there a pod llm-2, is serviceName of its StatefulSet llm-headless" in said
    )
    assert "publishNotReadyAddresses: true?" in said
    assert "\n" not in said
    assert any("SRV records name 2 of 3 pods; missing: llm-2" in text for text in progress.said)


def test_lasting_absence_is_remarked_before_the_time_is_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvllm.backends.k8s.discovery._LASTING_SECONDS", 0.2)
    cluster.start("llm-0", "127.0.0.2").address()
    progress = Progress()
    progress.when("publishNotReadyAddresses", lambda: cluster.name("llm-0", "127.0.0.2"))
    cluster.backend().place(Placement(world_size=1, worker_class=WORKER), ignore, LIMIT, progress)
    progress.check()


def test_srv_records_say_another_port_and_another_name(cluster: Cluster) -> None:
    cluster.start("llm-0", "127.0.0.2").address()
    cluster.name("llm-0", "127.0.0.2")
    cluster.records("llm-0", port=1)
    one = Placement(world_size=1, worker_class=WORKER)
    progress = Progress()
    first = cluster.backend()
    first.place(one, ignore, LIMIT, progress)
    assert f"SRV records say port 1, the workers are looked for at port {cluster.port}" in progress.said[-2]
    first.shutdown()
    with pytest.raises(PlacementError, match=r"SRV records name llm-0, none of which is vllm-N; k8s_pod_prefix is"):
        cluster.backend(pod_prefix="vllm").place(one, ignore, 1)


def test_a_silent_name_server_is_named(cluster: Cluster) -> None:
    cluster.dns.silent = True
    with pytest.raises(PlacementError, match=r"llm-0 cannot be looked up: no answer from name server 127\.0\.0\.1"):
        cluster.backend().place(Placement(world_size=1, worker_class=WORKER), ignore, 4)


def test_shutdown_ends_the_wait_for_names(cluster: Cluster) -> None:
    backend = cluster.backend()
    missing = threading.Event()
    progress = Progress()
    progress.when("NXDOMAIN", missing.set)
    errors: list[str] = []

    def run() -> None:
        try:
            backend.place(TWO, ignore, LIMIT, progress)
        except Exception as error:  # noqa: BLE001  looked at below
            errors.append(type(error).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    assert missing.wait(LIMIT)
    backend.shutdown()
    thread.join(LIMIT)
    assert errors == ["Shutdown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"service": "LLM"}, r"^k8s_service='LLM:\d+' is malformed; expected NAME"),
        ({"workers": ("127.0.0.1:1",)}, r"^k8s_workers and k8s_service='llm-headless:\d+' are both given; keep one$"),
        ({"token_file": None}, r"^k8s_service needs k8s_token_file, the token file that"),
        ({"tls_cert": None, "tls_key": None, "tls_ca": None}, r"^k8s_service='llm-headless:\d+' needs mutual TLS, "),
        ({"tls_key": None}, r"^mutual TLS needs certificate, key and CA; missing: tls_key$"),
        ({"gpus_per_pod": 0}, r"^k8s_gpus_per_pod=0; use 1 or more$"),
        ({"gpus_per_pod": 60000}, r"with k8s_gpus_per_pod=60000 stands for ports \d+ to \d+; the last port is 65535$"),
        ({"pod_prefix": ""}, r"^k8s_pod_prefix=''; expected a StatefulSet's name"),
        ({"pod_prefix": "Llm"}, r"^k8s_pod_prefix='Llm'; expected a StatefulSet's name"),
        ({"local_gpus": ["0"]}, r"^local_gpus=\['0'\] is for local workers, not k8s_service; leave one out$"),
    ],
)
def test_what_cannot_be_is_one_line(cluster: Cluster, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        cluster.backend(**options)
    assert "\n" not in str(error.value)


def test_a_prefix_is_for_a_service() -> None:
    with pytest.raises(ConfigError, match=r"^k8s_pod_prefix='llm' is for k8s_service, which is not given; leave it"):
        KubernetesBackend(pod_prefix="llm")


def test_a_layout_that_does_not_fill_the_pods(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"^k8s_gpus_per_pod=2 does not divide the 3 workers of this layout; use "):
        cluster.backend(gpus_per_pod=2).place(Placement(world_size=3, worker_class=WORKER), ignore, LIMIT)
    assert cluster.dns.asked == []


@pytest.mark.parity
@pytest.mark.slow
def test_parity_with_local_processes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``lightvllm parity`` gives the same digest with workers found by DNS as with processes of its own."""
    for index in range(2):
        cluster.start(f"big-{index}", f"127.0.0.{index + 2}")
        cluster.name(f"big-{index}", f"127.0.0.{index + 2}")
    monkeypatch.setattr(names, "system_resolver", lambda: cluster.dns.resolver(*SEARCH))
    (tmp_path / "prompts.txt").write_text("The quick brown\nParis is\n")
    model = str(tiny_llama.build(tmp_path / "model"))
    command = ["parity", model, "--executors", "k8s", "--layouts", "1x2,2x1", "--reference", "none"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "8", "--threads", "1"]
    by_dns = [f"--k8s-{name.replace('_', '-')}={path}" for name, path in cluster.driver.items()]
    by_dns += [f"--k8s-service=llm-headless:{cluster.port}", "--k8s-pod-prefix=big"]
    digests = []
    for name, options in (("local", []), ("dns", by_dns)):
        report = tmp_path / f"{name}.json"
        assert main([*command, "--json", str(report), *options]) == 0, capsys.readouterr()
        digests.append([run["digest"] for run in json.loads(report.read_text())["runs"]])
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
    assert any(name == f"big-1.{FULL}" for name, *_ in cluster.dns.asked)


def test_certificates_are_for_names(cluster: Cluster) -> None:
    """What a driver of ``llm-headless.prod`` asks of a certificate is ``llm-0.llm-headless.prod``."""
    cluster.start("llm-0", "127.0.0.2").address()
    cluster.name("llm-0", "127.0.0.2")
    said = r"llm-0 127\.0\.0\.2: its certificate is not for llm-0\.llm-headless\.prod$"
    with pytest.raises(PlacementError, match=said):
        cluster.backend("llm-headless.prod").place(Placement(world_size=1, worker_class=WORKER), ignore, 3)
