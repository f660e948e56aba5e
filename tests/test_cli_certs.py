"""``lightvllm certs``: its folders, its refusals, and a real worker and driver that meet with what it has made."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")
pytest.importorskip("cryptography", reason="the k8s extra is not installed")

from k8s_servers import WORKER, WorkerCommand, worker_command
from tls_probe import served_serial
from waiting import LIMIT

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.certs import read_certificate, usage_and_hosts
from lightvllm.cli.main import main
from lightvllm.errors import PlacementError
from lightvllm.messages import decode_reply, encode_call

FILES = {"ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600, "token": 0o600}


class Said:
    """What a run of the command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: object) -> str:
        assert main(["certs", *map(str, arguments)]) == 0, self._capsys.readouterr().err
        return self._capsys.readouterr().out

    def refused(self, *arguments: object) -> str:
        assert main(["certs", *map(str, arguments)]) == 1
        shown = self._capsys.readouterr()
        assert shown.out == ""
        return shown.err


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


@pytest.fixture
def group(tmp_path: Path, said: Said) -> Path:
    said.run(tmp_path / "group", "--workers", "gpu1+10.0.0.1,gpu2")
    return tmp_path / "group"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(cert: Path) -> tuple[str, list[str]]:
    return usage_and_hosts(read_certificate(cert.read_bytes()))


# ------------------------------------------------------------------------------------------------------- files


def test_each_machine_has_a_folder_with_what_it_needs(group: Path) -> None:
    machines = {"workers/gpu1", "workers/gpu2", "drivers/driver"}
    assert {str(path.relative_to(group)) for path in group.glob("*/*") if path.is_dir()} == machines
    for machine in machines:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (group / machine).iterdir()}
        assert modes == FILES
    authority = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (group / "ca").iterdir()}
    assert authority == {"ca.pem": 0o644, "ca-key.pem": 0o600, "token": 0o600}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in [group, *group.rglob("*")] if path.is_dir())
    keys = [path.read_bytes() for path in [*group.glob("*/*/key.pem"), group / "ca/ca-key.pem"]]
    assert len(set(keys)) == len(keys) == 4
    assert len({path.read_bytes() for path in group.rglob("ca.pem")}) == 1
    assert len({path.read_bytes() for path in group.rglob("token")}) == 1


def test_certificates_hold_the_names_that_were_given_and_no_others(group: Path) -> None:
    assert names(group / "workers/gpu1/cert.pem") == ("server", ["gpu1", "10.0.0.1"])
    assert names(group / "workers/gpu2/cert.pem") == ("server", ["gpu2"])
    assert names(group / "drivers/driver/cert.pem") == ("client", [])


def test_it_prints_where_each_file_goes_and_no_secret(tmp_path: Path, said: Said) -> None:
    group = tmp_path / "g"
    shown = said.run(group, "--workers", "gpu1,fd00::1,127.0.0.1", "--driver", "front")
    assert f"scp -p {group}/workers/gpu1/* gpu1:lightvllm-certs/" in shown
    assert f"scp -p {group}/workers/fd00::1/* '[fd00::1]:lightvllm-certs/'" in shown
    assert "--k8s-workers 'gpu1:9000,[fd00::1]:9000,127.0.0.1:9000'" in shown
    assert "--listen '[::]:9000'" in shown
    assert f"{group}/drivers/front: cert.pem, key.pem, ca.pem, token" in shown
    assert "127.0.0.1:lightvllm-certs" not in shown, "nothing is copied to this machine"
    for content in contents(group).values():
        for line in content.decode().splitlines():
            assert line not in shown


def test_the_folder_may_be_there_if_it_is_empty_and_private(tmp_path: Path, said: Said) -> None:
    tmp_path.chmod(0o700)
    said.run(tmp_path, "--workers", "gpu1")
    assert (tmp_path / "workers/gpu1/key.pem").exists()


# ---------------------------------------------------------------------------------------------- adding, renewing


def test_a_worker_is_added_by_the_same_ca(group: Path, said: Said) -> None:
    before = contents(group)
    shown = said.run(group, "--workers", "gpu3")
    after = contents(group)
    assert before.items() <= after.items()
    assert {*after} - {*before} == {f"workers/gpu3/{name}" for name in FILES}
    ca = read_certificate(before["ca/ca.pem"])
    read_certificate(after["workers/gpu3/cert.pem"]).verify_directly_issued_by(ca)
    assert "drivers reach this group with --k8s-workers gpu1:9000,gpu2:9000,gpu3:9000" in shown


def test_nothing_is_replaced_unasked(group: Path, said: Said) -> None:
    before = contents(group)
    assert "workers/gpu1 is there already; replace its certificate with --renew" in said.refused(
        group, "--workers", "gpu9,gpu1"
    )
    assert "drivers/driver is there already" in said.refused(group, "--driver", "driver")
    assert contents(group) == before


def test_renewal_replaces_key_and_certificate_and_keeps_the_names(group: Path, said: Said) -> None:
    before = contents(group)
    said.run(group, "--renew", "--workers", "gpu1", "--days", "30")
    after = contents(group)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"workers/gpu1/cert.pem", "workers/gpu1/key.pem"}
    assert {*after} == {*before}, "no temporary file is left"
    assert names(group / "workers/gpu1/cert.pem") == ("server", ["gpu1", "10.0.0.1"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (group / "workers/gpu1").iterdir()}
    assert modes == FILES


def test_renewal_of_all(group: Path, said: Said) -> None:
    before = contents(group)
    said.run(group, "--renew")
    changed = {name for name, content in contents(group).items() if content != before[name]}
    assert changed == {
        f"{m}/{f}.pem" for m in ("workers/gpu1", "workers/gpu2", "drivers/driver") for f in ("cert", "key")
    }


def test_without_the_ca_key_nothing_is_added(group: Path, said: Said) -> None:
    (group / "ca/ca-key.pem").unlink()
    before = contents(group)
    assert "ca-key.pem is gone, and without it nothing can be signed" in said.refused(group, "--workers", "gpu3")
    assert contents(group) == before


def test_a_strange_ca_key_is_refused(group: Path, said: Said) -> None:
    (group / "ca/ca-key.pem").write_bytes((group / "drivers/driver/key.pem").read_bytes())
    assert "not the one of its certificate" in said.refused(group, "--workers", "gpu3")


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a new group needs --workers"),
        (["--driver", "me"], "a new group needs --workers"),
        (["--renew"], "holds no group"),
        (["--workers", "gpu1:9000"], "leave the port out: gpu1"),
        (["--workers", "gpu1,gpu1"], "gpu1 is named more than once"),
        (["--workers", "gpu1+"], "'' is neither a DNS name nor an IP address"),
        (["--workers", "../x"], "'../x' is neither"),
        (["--workers", "gpu1", "--driver", "../x"], "driver name '../x' is malformed"),
        (["--workers", "gpu1", "--days", "400", "--ca-days", "300"], "would outlive its CA"),
    ],
)
def test_a_wrong_wish_leaves_nothing_behind(tmp_path: Path, said: Said, arguments: list[str], message: str) -> None:
    assert message in said.refused(tmp_path / "g", *arguments)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to add"),
        (["--workers", "gpu3", "--ca-days", "10"], "--ca-days is for a new group"),
        (["--renew", "--workers", "gpu3"], "is not there, so that it cannot be renewed"),
        (["--renew", "--workers", "gpu1+gpu4"], "keeps the names of gpu1 (gpu1, 10.0.0.1)"),
    ],
)
def test_a_wrong_wish_for_a_group(group: Path, said: Said, arguments: list[str], message: str) -> None:
    before = contents(group)
    assert message in said.refused(group, *arguments)
    assert contents(group) == before


def test_a_folder_open_to_others_is_refused(tmp_path: Path, said: Said) -> None:
    tmp_path.chmod(0o750)
    assert f"(mode 0750); run: chmod 700 {tmp_path}" in said.refused(tmp_path, "--workers", "gpu1")


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path, said: Said) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no group" in said.refused(tmp_path, "--workers", "gpu1")


def test_without_cryptography_the_install_command_is_said(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from lightvllm.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "certs", str(tmp_path / "g"), "--workers", "gpu1"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("run: pip install 'lightvllm[k8s]'\n")
    assert not (tmp_path / "g").exists()


# ------------------------------------------------------------------------------------- a worker and its drivers


@pytest.fixture
def local(tmp_path: Path, said: Said) -> Path:
    """A group with a worker on this machine, and one that is elsewhere."""
    said.run(tmp_path / "local", "--workers", "127.0.0.1,gpu1.example")
    return tmp_path / "local"


def serve(folder: Path) -> AbstractContextManager[WorkerCommand]:
    """A worker on every address of this machine, with the files of ``folder``."""
    return worker_command(
        *("--listen", "0.0.0.0:0", "--token-file", str(folder / "token")),
        *("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem")),
        *("--tls-ca", str(folder / "ca.pem")),
    )


def drive(command: WorkerCommand, folder: Path, timeout: float = LIMIT, token: Path | None = None) -> None:
    """One call by a driver with the files of ``folder``."""
    files = [str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")]
    address = command.address().replace("0.0.0.0", "127.0.0.1")
    backend = KubernetesBackend((address,), str((token or folder) / "token"), *files)
    try:
        (ref,) = backend.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, timeout)
        assert decode_reply("echo", backend.call(ref, *encode_call("echo", (1,), None)).result(LIMIT)) == 1
    finally:
        backend.shutdown()


@pytest.fixture
def worker(local: Path) -> Iterator[WorkerCommand]:
    with serve(local / "workers/127.0.0.1") as command:
        yield command


def test_worker_and_driver_of_a_group_meet(worker: WorkerCommand, local: Path) -> None:
    drive(worker, local / "drivers/driver")


def test_the_printed_options_are_the_ones_to_use(tmp_path: Path, said: Said) -> None:
    shown = said.run(tmp_path / "g", "--workers", "127.0.0.1")
    found = re.search(r"lightvllm worker (.*)", shown)
    assert found
    options = [option.replace(":9000", ":0") for option in shlex.split(found[1])]
    with worker_command(*options) as command:
        drive(command, tmp_path / "g/drivers/driver")


def test_a_worker_that_was_added_meets_the_drivers_of_before(local: Path, said: Said) -> None:
    said.run(local, "--workers", "localhost+127.0.0.1")
    with serve(local / "workers/localhost") as command:
        drive(command, local / "drivers/driver")


def test_a_workers_certificate_is_no_drivers(worker: WorkerCommand, local: Path) -> None:
    """gRPC's server checks the extended key usage."""
    with pytest.raises(PlacementError, match="0 of 1 workers"):
        drive(worker, local / "workers/127.0.0.1", 2.0)
    drive(worker, local / "drivers/driver")


def test_a_drivers_certificate_is_no_workers(local: Path) -> None:
    """gRPC's client checks it, too."""
    with (
        serve(local / "drivers/driver") as command,
        pytest.raises(PlacementError, match="unsupported certificate purpose"),
    ):
        drive(command, local / "drivers/driver", 2.0)


def test_a_certificate_for_another_host_is_refused(local: Path) -> None:
    with (
        serve(local / "workers/gpu1.example") as command,
        pytest.raises(PlacementError, match=r"0 of 1 workers.*its certificate is not for 127\.0\.0\.1$"),
    ):
        drive(command, local / "drivers/driver", 2.0)


def test_groups_do_not_trust_each_other(worker: WorkerCommand, local: Path, tmp_path: Path, said: Said) -> None:
    said.run(tmp_path / "other", "--workers", "127.0.0.1")
    token = local / "drivers/driver"
    with pytest.raises(PlacementError, match=r"0 of 1 workers.*CERTIFICATE_VERIFY_FAILED"):
        drive(worker, tmp_path / "other/drivers/driver", 2.0, token)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("cert.pem", "key.pem"):  # it trusts the worker, which does not trust it
        os.link(tmp_path / "other/drivers/driver" / name, mixed / name)
    os.link(local / "ca/ca.pem", mixed / "ca.pem")
    with pytest.raises(PlacementError, match="0 of 1 workers"):
        drive(worker, mixed, 2.0, token)


def test_a_waiting_worker_uses_its_renewed_certificate(worker: WorkerCommand, local: Path, said: Said) -> None:
    port, cert = int(worker.address().rpartition(":")[2]), local / "workers/127.0.0.1/cert.pem"
    first = read_certificate(cert.read_bytes()).serial_number
    assert served_serial(port, local / "drivers/driver") == first
    said.run(local, "--renew")
    second = read_certificate(cert.read_bytes()).serial_number
    assert served_serial(port, local / "drivers/driver") == second != first
    assert not any("starting a fresh one" in line for line in worker.lines), "it is the same process"
    drive(worker, local / "drivers/driver")
