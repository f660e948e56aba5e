"""What bash and Python run in the pods of a group in which workers and engine are processes beside each other.

A StatefulSet has one template: whether a pod is the leader, a script asks ``LWS_WORKER_INDEX``. The image must
have bash and python3. ``tests/test_operator_scripts.py`` runs them.
"""

from __future__ import annotations

from lightvllm.backends.k8s.labels import HTTP_PORT

WORKER_PORT = 50051
"""Of a pod's first worker; the others follow."""

WORKERS_FOLDER = "/etc/lightvllm/workers"
"""Token and certificate of the workers."""

ANSWER_SECONDS = 4
"""For one answer to a probe."""

# The leader's server may finish its requests, for which it needs the workers: so it ends first. When one of the two
# ends by itself, both do, and the kubelet starts the container anew.
_RUN = """\
{worker} &
worker=$!
server=
end() {{
  trap '' TERM INT
  for each in $server $worker; do kill "$each" 2>/dev/null; wait "$each"; done
}}
trap 'end; exit 143' TERM INT
if [ "$LWS_WORKER_INDEX" = 0 ]; then
  "$@" &
  server=$!
fi
wait -n
status=$?
end
exit $status
"""

# A worker is needed until the leader's requests are done: it goes when the leader's own worker server has gone.
_LEAVE = """\
if [ "$LWS_WORKER_INDEX" = 0 ]; then sleep {pause}; exit; fi
for ((waited = 0; waited < {most}; waited++)); do
  (exec 3<>"/dev/tcp/$LWS_LEADER_ADDRESS/{port}") 2>/dev/null || exit 0
  sleep 1
done
"""

# http.client heeds no proxy. The certificate is for the names that clients use, so that it cannot be checked here.
_ASK = """\
import http.client, os, socket, ssl, sys
path, secure, workers, host = sys.argv[1], sys.argv[2] == "https", int(sys.argv[3]), sys.argv[4]
for number in range(workers):
    socket.create_connection((host, {worker_port} + number), {seconds}).close()
if os.environ["LWS_WORKER_INDEX"] == "0":
    context = {{"context": ssl._create_unverified_context()}} if secure else {{}}
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    server = connect(host, {http_port}, timeout={seconds}, **context)
    server.request("GET", path)
    sys.exit(server.getresponse().status != 200)
"""


def run(workers: int, host: str) -> str:
    """For bash: that many worker servers, listening on ``host``, and in the leader the command that follows as
    arguments."""
    address = f"[{host}]" if ":" in host else host
    return _RUN.format(
        worker=(
            f"lightvllm worker --listen {address}:{WORKER_PORT} --workers {workers}"
            f" --token-file {WORKERS_FOLDER}/token --tls-cert {WORKERS_FOLDER}/cert.pem"
            f" --tls-key {WORKERS_FOLDER}/key.pem --tls-ca {WORKERS_FOLDER}/ca.pem"
        )
    )


def leave(pause: int, most: int, port: int = WORKER_PORT) -> str:
    """For bash, before a pod is told to end.

    Args:
        pause: seconds that the leader waits, for Services to stop sending.
        most: seconds that another pod waits for the leader to be done.
        port: that the leader's worker server listens on.
    """
    return _LEAVE.format(pause=pause, most=most, port=port)


def ask(
    path: str,
    *,
    tls: bool,
    workers: int,
    worker_port: int = WORKER_PORT,
    http_port: int = HTTP_PORT,
    host: str = "127.0.0.1",
) -> list[str]:
    """The command of a probe: whether the worker servers listen and, in the leader, the API answers ``path`` with 200.

    The kubelet's own gRPC probes know no TLS, and what is to be asked differs between leader and workers.
    """
    script = _ASK.format(worker_port=worker_port, http_port=http_port, seconds=ANSWER_SECONDS)
    return ["python3", "-c", script, path, "https" if tls else "http", str(workers), host]
