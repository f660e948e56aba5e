"""Hostile input to a worker's listeners, at length: ``python benchmarks/fuzz.py --inputs 100000``.

The inputs, and what must hold, are the tests' (``tests/fuzz_k8s.py``): nothing is executed, the worker and its
supervisor stay as they are (process, memory, threads, descriptors), whoever is being served is not disturbed, and the
next proper driver is served. Ends with status 1 and the input in hex at the first that does otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = str(Path(__file__).resolve().parent.parent / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])

from fuzz_k8s import (  # noqa: E402
    Bait,
    Counts,
    besiege,
    besiege_ticket,
    fuzz_frames,
    fuzz_handshake,
    fuzz_session_decoding,
    garbage_to_direct,
    garbage_to_session,
    served_by_command,
    served_locally,
    serves,
)
from waiting import wait_until  # noqa: E402


def run(inputs: int, seed: int) -> None:
    counts = Counts()
    started = time.monotonic()

    def share(parts: float) -> int:
        """``parts`` percent of the inputs, at least one of each kind."""
        return max(11, round(inputs * parts / 100))

    with tempfile.TemporaryDirectory() as folder:
        traces = Path(folder, "traces")
        traces.mkdir()
        bait = Bait(traces)
        for label, tls in (("TCP", False), ("TLS", True)):
            (home := Path(folder, label)).mkdir()
            with served_by_command(label, home, tls) as (server, strangers):
                if tls:
                    fuzz_handshake(server().door, strangers, share(5), seed, counts)
                print(besiege(server(), share(4 if tls else 20), seed, bait, counts), flush=True)
                for transport in ("grpc", "direct"):
                    driver = server().driver(transport)
                    siege = besiege(server(), share(2 if tls else 10), seed, bait, counts, driver)
                    print(f"{siege} ({transport} carrier)", flush=True)
                    driver.close()
                    serves(server(), transport)
                besiege_ticket(server(), share(2 if tls else 4), seed, counts)
                for number in range(max(1, inputs // 4000)):
                    for garbage in (garbage_to_direct, garbage_to_session):
                        before = server()
                        garbage(before, seed + number, counts)
                        wait_until(lambda before=before: server().pid != before.pid, "a fresh worker process")
                serves(server())
        with served_locally("Unix") as local:
            print(besiege(local, share(14), seed, bait, counts), flush=True)
            local_driver = local.driver()
            print(besiege(local, share(8), seed, bait, counts, local_driver), flush=True)
            local_driver.close()
        with served_locally("Unix") as local:
            besiege_ticket(local, share(4), seed, counts)
        fuzz_session_decoding(share(10), seed, counts)
        fuzz_frames(share(10), seed, counts)
        assert bait.traces() == [], bait.traces()
    for kind, count in sorted(counts.by_kind.items()):
        print(f"{count:8} {kind}")
    print(f"{counts.total:8} in all, in {time.monotonic() - started:.0f} s; nothing was executed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    run(options.inputs, options.seed)


if __name__ == "__main__":
    main()
