"""Runs the pods of a planned StatefulSet as processes, each with a network and an address of its own; for tests.

``python pods_in_namespaces.py PLAN FOLDER``, started by ``test_operator_pods.py`` inside new user, mount, network and
process namespaces, in which it is root and whose end is the end of all it has started. It does what a cluster would:
addresses, names (a name server that knows the headless Service's pods), the group's certificates (by the commands that
the plan names), probes, and an orderly end. What is mounted at ``/etc/lightvllm`` lies in FOLDER instead; there is no
image, no volume and no limit. Prints one JSON object: what was seen.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import dns.rrset
import yaml
from waiting import LIMIT, wait_until

HOST = "10.66.0.254"
API = "http://10.66.0.1:8000"
MODEL = "tiny"
TOKENS = 1500
"""Of the answer during which the pods are told to end: seconds of work."""


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)


class Pod:
    """One pod of the group."""

    def __init__(self, name: str, index: int, container: dict[str, Any], folder: Path) -> None:
        self.index = index
        self.address = f"10.66.0.{index + 1}"
        self._container = container
        self._folder = folder
        own = {"metadata.labels['apps.kubernetes.io/pod-index']": str(index), "status.podIP": self.address}
        self._env = {**os.environ, "OMP_NUM_THREADS": "1"}
        for each in container["env"]:
            if each["name"] not in ("HOME", "XDG_CACHE_HOME"):  # there are no volumes
                path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                self._env[each["name"]] = each["value"] if path is None else own[path]
        self._network = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sleep", "infinity"])
        wait_until(lambda: self._namespace() != os.readlink("/proc/self/ns/uts"), "a network of its own", LIMIT)
        sh(f"ip link add pod{index} type veth peer name eth0 netns {self._network.pid}")
        sh(f"ip link set pod{index} master br0 up")
        inside = f"nsenter --target {self._network.pid} --net --mount --uts"
        sh(f"{inside} ip addr add {self.address}/24 dev eth0 && {inside} ip link set eth0 up")
        sh(f"{inside} ip link set lo up")
        hosts = folder / f"hosts-{index}"
        hosts.write_text(f"127.0.0.1 localhost\n{self.address} {name}\n")
        sh(f"{inside} mount --bind {hosts} /etc/hosts && {inside} hostname {name}")
        sh(f"{inside} mount --bind {folder / 'resolv.conf'} /etc/resolv.conf")
        self.process: subprocess.Popen[bytes] | None = None

    def _namespace(self) -> str:
        return os.readlink(f"/proc/{self._network.pid}/ns/uts")

    def has(self, pid: int) -> bool:
        """Whether the process runs in this pod."""
        return os.readlink(f"/proc/{pid}/ns/uts") == self._namespace()

    def _inside(self, command: list[str]) -> list[str]:
        mounted = [word.replace("/etc/lightvllm", str(self._folder)) for word in command]
        return ["nsenter", "--target", str(self._network.pid), "--net", "--mount", "--uts", *mounted]

    def start(self) -> None:
        command = self._inside([*self._container["command"], *self._container["args"]])
        with open(self._folder / f"pod-{self.index}.log", "ab") as log:
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def run(self, command: list[str]) -> int:
        return subprocess.run(self._inside(command), env=self._env, capture_output=True, timeout=LIMIT).returncode

    def ready(self) -> bool:
        return self.run(self._container["readinessProbe"]["exec"]["command"]) == 0

    def end(self) -> int:
        """As the kubelet ends a pod: its status."""
        assert self.process is not None
        self.run(self._container["lifecycle"]["preStop"]["exec"]["command"])
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)


def serve_names(names: dict[str, str]) -> None:
    """Answers A for the full names, and that there is nothing else."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((HOST, 53))

    def run() -> None:
        while True:
            wire, sender = udp.recvfrom(65535)
            query = dns.message.from_wire(wire)
            reply = dns.message.make_response(query)
            name = query.question[0].name.to_text(omit_final_dot=True).lower()
            if name not in names:
                reply.set_rcode(dns.rcode.NXDOMAIN)
            elif query.question[0].rdtype == 1:
                reply.answer.append(dns.rrset.from_text(query.question[0].name, 5, "IN", "A", names[name]))
            udp.sendto(reply.to_wire(), sender)

    threading.Thread(target=run, daemon=True).start()


def complete(max_tokens: int, on_first: Any = None) -> list[str]:
    """The texts of a streamed completion; fails unless it ends as it should."""
    body = {"model": MODEL, "prompt": "Paris", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{API}/v1/completions", json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    texts: list[str] = []
    with urllib.request.urlopen(request, timeout=LIMIT) as reply:
        for line in reply:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return texts
            if data:
                texts += [choice["text"] for choice in json.loads(data)["choices"]]
                if len(texts) == 1 and on_first is not None:
                    on_first()
    raise AssertionError("the stream broke off")


def main(plan: Path, folder: Path) -> dict[str, Any]:
    text = plan.read_text()
    (group,) = [each for each in yaml.safe_load_all(text) if each["kind"] == "StatefulSet"]
    (container,) = group["spec"]["template"]["spec"]["containers"]
    for line in text.splitlines():
        if line.startswith("#     lightvllm certs"):
            subprocess.run(shlex.split(line.removeprefix("#     ")), cwd=folder, check=True, capture_output=True)
        elif line.startswith("#     kubectl create secret generic"):
            *_, secret, source = line.split()
            where = secret.rpartition("-")[2]  # workers, driver: as the plan mounts them
            (folder / where).symlink_to(folder / source.partition("=")[2])
    sh(f"ip link set lo up; ip link add br0 type bridge; ip addr add {HOST}/24 dev br0; ip link set br0 up")
    (folder / "resolv.conf").write_text(f"nameserver {HOST}\nsearch default.svc.cluster.local\noptions ndots:5\n")
    name, service = group["metadata"]["name"], group["spec"]["serviceName"]
    pods = [Pod(f"{name}-{index}", index, container, folder) for index in range(group["spec"]["replicas"])]
    serve_names({f"{name}-{pod.index}.{service}.default.svc.cluster.local": pod.address for pod in pods})
    seen: dict[str, Any] = {}
    for pod in reversed(pods):
        pod.start()
    seen["worker is ready without the leader"] = wait_until(pods[1].ready, "pod 1 is ready")
    wait_until(pods[0].ready, "pod 0 is ready")
    seen["before"] = "".join(complete(20))

    seen |= worker_dies(pods)
    seen["after"] = "".join(complete(20))
    return seen | told_to_end(pods)


def worker_dies(pods: list[Pod]) -> dict[str, Any]:
    """The process of pod 1's worker is killed: the leader's container ends and, as by a kubelet, starts again."""
    leader = pods[0].process
    assert leader is not None
    workers = subprocess.run(
        ["pgrep", "-f", "lightvllm.backends.k8s.server"], capture_output=True, text=True, check=True
    )
    (victim,) = [int(pid) for pid in workers.stdout.split() if pods[1].has(int(pid))]
    os.kill(victim, signal.SIGKILL)
    status = leader.wait(LIMIT)
    pods[0].start()
    wait_until(pods[0].ready, "pod 0 is ready again")
    return {"leader's status": status, "pod 1 went on": pods[1].process is not None and pods[1].process.poll() is None}


def told_to_end(pods: list[Pod]) -> dict[str, Any]:
    """Both pods are told to go while a client is served."""
    seen: dict[str, Any] = {}
    statuses: dict[int, int] = {}
    ends = [threading.Thread(target=lambda pod=pod: statuses.update({pod.index: pod.end()})) for pod in pods]
    texts = complete(TOKENS, lambda: [end.start() for end in ends])
    seen["pods that had ended before the last token"] = sorted(statuses)
    for end in ends:
        end.join(LIMIT)
    return seen | {"pieces": len(texts), "statuses": [statuses[pod.index] for pod in pods]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
