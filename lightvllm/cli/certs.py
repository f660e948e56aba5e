"""``lightvllm certs``: a group's CA, certificates and token, for clusters of ``lightvllm worker`` run by hand.

One folder for each machine, with all that this machine needs and nothing that another one does:

    DIR/ca/             ca.pem  ca-key.pem  token     stays where it is; whoever has it can join in any role
    DIR/workers/HOST/   cert.pem  key.pem  ca.pem  token
    DIR/drivers/NAME/   cert.pem  key.pem  ca.pem  token

What certificates are made of is ``lightvllm/certs.py``'s business. Prints file names and commands, never a secret.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    from lightvllm.certs import Authority, Certificate

_SECRET, _PUBLIC = 0o600, 0o644
_PORT = 9000  # in the commands that are printed
_REMOTE = "lightvllm-certs"  # folder on another machine, in the commands that are printed


def certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the group; made if it is missing.")],
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[+NAME…],…",
            help="Workers' machines, by the host name or IP address that drivers connect to; others of the same "
            "machine are joined with '+'.",
        ),
    ] = None,
    driver: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A driver to make a certificate for.", show_default="driver in a new group"),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Replace keys and certificates, for the same names: those of --workers and --driver, or all.",
        ),
    ] = False,
    days: Annotated[int, typer.Option(min=1, max=36500, help="Validity of certificates, days.")] = 365,
    ca_days: Annotated[
        int | None,
        typer.Option(min=1, max=36500, help="Validity of a new group's CA, days.", show_default="3650"),
    ] = None,
) -> None:
    """Make the certificates for mutual TLS between drivers and 'lightvllm worker', and the token.

    The first run makes the group's CA; later ones add to the group. Nothing is replaced without --renew.
    """
    from lightvllm.certs import CA_DAYS, Authority

    asked = [_Machine.worker(entry) for entry in filter(None, map(str.strip, (workers or "").split(",")))]
    if driver is not None:
        asked.append(_Machine.driver(driver))
    is_new = _check_directory(directory)
    if is_new:
        if renew:
            raise ConfigError(f"{directory} holds no group, so that there is nothing to renew")
        if not asked or all(machine.role == "drivers" for machine in asked):
            raise ConfigError("a new group needs --workers, such as --workers gpu1,gpu2+10.0.0.2")
        if driver is None:
            asked.append(_Machine.driver("driver"))
    elif ca_days is not None:
        raise ConfigError(f"--ca-days is for a new group, but {directory} holds one; leave it out, or use another DIR")
    elif renew:
        asked = _known(directory, asked)
    elif not asked:
        raise ConfigError(f"{directory} holds a group; say what to add (--workers, --driver), or --renew")
    _check_apart(directory, asked, renew)

    authority, token = (
        (Authority.new(ca_days or CA_DAYS), _new_token()) if is_new else _read_authority(directory / "ca")
    )
    made = [(machine, authority.issue(machine.name, machine.usage, machine.hosts, days)) for machine in asked]
    _write(directory, authority, token, made, is_new=is_new, replace=renew)
    for line in _instructions(directory, authority, made, renew):
        typer.echo(line)


@dataclass(frozen=True)
class _Machine:
    """Who gets a certificate: its folder's name, and the names that are in the certificate."""

    role: str
    name: str
    hosts: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.role) / self.name.replace("*", "_wildcard")

    @property
    def usage(self) -> Literal["server", "client"]:
        return "server" if self.role == "workers" else "client"

    @classmethod
    def worker(cls, entry: str) -> _Machine:
        from lightvllm.certs import general_name

        hosts = tuple(str(general_name(host.strip()).value) for host in entry.split("+"))
        return cls("workers", hosts[0], hosts)

    @classmethod
    def driver(cls, name: str) -> _Machine:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", name):
            raise ConfigError(f"driver name {name!r} is malformed; expected up to 64 letters, digits and any of _.@-")
        return cls("drivers", name, ())


def _check_directory(directory: Path) -> bool:
    """Whether the group is yet to be made. Raises ConfigError for a folder that is not for this or open to others."""
    try:
        status = directory.stat()
        entries = sorted(os.listdir(directory))
    except FileNotFoundError:
        return True
    except OSError as error:
        raise ConfigError(f"folder {directory}: {error.strerror}") from None
    if status.st_uid != os.geteuid():
        raise ConfigError(f"folder {directory} belongs to another user; use one of your own")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"folder {directory} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"run: chmod 700 {shlex.quote(str(directory))}"
        )
    if entries and "ca" not in entries:
        raise ConfigError(f"folder {directory} is not empty and holds no group; give one that is, or a new one")
    return not entries


def _known(directory: Path, asked: list[_Machine]) -> list[_Machine]:
    """The members of the group in ``directory`` that are to be renewed, with the names that they have."""
    members = {machine.folder: machine for machine in _members(directory)}
    for machine in asked:
        if machine.folder not in members:
            raise ConfigError(
                f"{directory / machine.folder} is not there, so that it cannot be renewed; leave out --renew to add it"
            )
        if len(machine.hosts) > 1:
            raise ConfigError(
                f"--renew keeps the names of {machine.name} ({', '.join(members[machine.folder].hosts)}); to change "
                f"them, delete {directory / machine.folder} and add it without --renew"
            )
    if not members:
        raise ConfigError(f"the group in {directory} has no members to renew")
    return [members[machine.folder] for machine in asked] or list(members.values())


def _members(directory: Path) -> Iterator[_Machine]:
    """Workers, then drivers, as their certificates tell."""
    from lightvllm.certs import read_certificate, usage_and_hosts

    for role in ("workers", "drivers"):
        for path in sorted((directory / role).glob("*/cert.pem")):
            try:
                usage, hosts = usage_and_hosts(read_certificate(_read(path)))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            if (usage == "server") != (role == "workers"):
                raise ConfigError(f"{path} is a {usage}'s certificate, which does not belong in {role}")
            name = path.parent.name.replace("_wildcard", "*") if role == "workers" else path.parent.name
            yield _Machine(role, name, tuple(hosts))


def _check_apart(directory: Path, asked: list[_Machine], renew: bool) -> None:
    folders = [machine.folder for machine in asked]
    if repeated := {machine.name for machine in asked if folders.count(machine.folder) > 1}:
        raise ConfigError(f"{', '.join(sorted(repeated))} is named more than once")
    for folder in folders:
        if not renew and (directory / folder).exists():
            raise ConfigError(f"{directory / folder} is there already; replace its certificate with --renew")


def _new_token() -> bytes:
    from lightvllm.backends.k8s.security import Token

    return Token.new().reveal().encode() + b"\n"


def _read_authority(folder: Path) -> tuple[Authority, bytes]:
    from lightvllm.certs import Authority

    if not (folder / "ca-key.pem").exists():
        raise ConfigError(f"{folder / 'ca-key.pem'} is gone, and without it nothing can be signed; make a new group")
    try:
        authority = Authority.load(_read(folder / "ca.pem"), _read(folder / "ca-key.pem"))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return authority, _read(folder / "token")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _write(
    directory: Path,
    authority: Authority,
    token: bytes,
    made: list[tuple[_Machine, Certificate]],
    *,
    is_new: bool,
    replace: bool,
) -> None:
    from lightvllm.certs import write_files

    write_files(directory, {})
    if is_new:
        write_files(
            directory / "ca",
            {"ca-key.pem": (authority.key, _SECRET), "token": (token, _SECRET), "ca.pem": (authority.cert, _PUBLIC)},
        )
    for machine, certificate in made:
        write_files(directory / machine.role, {})
        write_files(
            directory / machine.folder,
            {
                "ca.pem": (authority.cert, _PUBLIC),
                "token": (token, _SECRET),
                "key.pem": (certificate.key, _SECRET),
                "cert.pem": (certificate.cert, _PUBLIC),
            },
            replace,
        )


def _instructions(
    directory: Path, authority: Authority, made: list[tuple[_Machine, Certificate]], renew: bool
) -> Iterator[str]:
    yield f"{directory / 'ca'}  (until {authority.not_after:%Y-%m-%d}): stays here; whoever has it can join the group"
    new = [machine.name for machine, _ in made if machine.role == "workers"]
    names = [machine.name for machine in _members(directory) if machine.role == "workers" and machine.name not in new]
    names += new  # in the order given, which is that of the ranks
    addresses = shlex.quote(",".join(f"{_bracketed(name.replace('*', 'HOST'))}:{_PORT}" for name in names))
    for machine, certificate in made:
        folder, name = directory / machine.folder, machine.name
        here = machine.role == "drivers" or _is_loopback(name)
        known_as = f", known as {', '.join(machine.hosts)}" if machine.hosts else ""
        yield ""
        yield f"{machine.role.removesuffix('s')} {name}  (until {certificate.not_after:%Y-%m-%d}{known_as})"
        yield f"  files     {folder}: cert.pem, key.pem, ca.pem, token"
        if not here:
            host = name.replace("*", "HOST")
            remote = shlex.quote(f"{_bracketed(host)}:{_REMOTE}/")
            yield f"  copy      ssh {host} mkdir -p -m 700 {_REMOTE} && scp -p {shlex.quote(str(folder))}/* {remote}"
        elif machine.role == "drivers":
            yield "  copy      if the driver runs on another machine: the whole folder, with its modes (scp -pr)"
        if renew:
            continue
        at = shlex.quote(str(folder)) if here else _REMOTE
        files = {"token-file": "token", "tls-cert": "cert.pem", "tls-key": "key.pem", "tls-ca": "ca.pem"}
        if machine.role == "workers":
            options = " ".join(f"--{option} {at}/{file}" for option, file in files.items())
            listen = shlex.quote(f"{_listen(name)}:{_PORT}")
            yield f"  run there lightvllm worker --listen {listen} {options}"
        else:
            options = " ".join(f"--k8s-{option} {at}/{file}" for option, file in files.items())
            yield f"  run       lightvllm generate MODEL --executor k8s --k8s-workers {addresses} {options}"
    if not renew and not any(machine.role == "drivers" for machine, _ in made):
        yield ""
        yield f"drivers reach this group with --k8s-workers {addresses}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str) -> str:
    """Where the worker on ``host`` is to listen: everywhere, unless it is for this machine alone."""
    if _is_loopback(host):
        return _bracketed(host)
    return "[::]" if ":" in host else "0.0.0.0"  # noqa: S104  it is mutual TLS
