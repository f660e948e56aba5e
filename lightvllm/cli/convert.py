"""``lightvllm convert``: a KubeRay manifest that runs vLLM as an ``LLMInference``. Talks to no cluster."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lightvllm.cli.manifest import called, content
from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from lightvllm.operator.convert import Converted
    from lightvllm.operator.convert.tracked import Note

_HEADINGS = {
    "lost": "could not be carried over",
    "check": "must be looked at",
    "replaced": "needless now, or replaced",
}


def convert(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE|-",
            help="YAML with a RayService, RayCluster or RayJob that runs vLLM; - reads standard input.",
        ),
    ],
    image: Annotated[
        str | None,
        typer.Option(
            help="The container image, which holds vLLM and lightvllm with its extra k8s.",
            show_default="the manifest's",
        ),
    ] = None,
    api_key_secret: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[/ENTRY]",
            help="The Secret with the key that requests must bring.",
            show_default="that of VLLM_API_KEY, else the name with -api-key, /api-key",
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated", help="Serve everybody whom the network lets through without a key, as Ray does."
        ),
    ] = False,
    prometheus_address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The Prometheus that has the router's metrics: Ray Serve's autoscaling becomes spec.autoscaling.",
            show_default="the number of replicas is fixed",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit status 1 if something could not be carried over or must be looked at."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, documents and notes, in place of YAML.")
    ] = False,
) -> None:
    """Print the LLMInferences that a KubeRay manifest becomes, and what of it could not be carried over.

    That list stands in comments at the top, and on standard error. Everything in the manifest is either carried over or
    in it. It names places and reasons, no values.
    """
    try:
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "pydantic", "operator", "lightvllm convert") from None
    from lightvllm.operator import text
    from lightvllm.operator.convert import Settings
    from lightvllm.operator.convert import convert as make

    if allow_unauthenticated and api_key_secret is not None:
        raise ConfigError("--api-key-secret and --allow-unauthenticated are both given; keep one")
    name, _, entry = (api_key_secret or "").partition("/")
    key = (name, entry or "api-key") if api_key_secret is not None else None
    settings = Settings(image, key, allow_unauthenticated, prometheus_address)
    converted = make(content(target), called(target), settings)
    if as_json:
        sys.stdout.write(json.dumps(_as_json(converted), ensure_ascii=False, indent=2) + "\n")
    else:
        parts = [_comment(one) + text.dump(one.documents) for one in converted]
        sys.stdout.write("---\n".join(parts))
        sys.stderr.write("".join(_said(one, "") for one in converted))
    open_notes = sum(note.kind != "replaced" for one in converted for note in one.notes)
    if strict and open_notes:
        raise ConfigError(f"--strict: {open_notes} of the notes name something that was lost or must be looked at")


def _as_json(converted: list[Converted]) -> dict[str, object]:
    notes = [
        {"from": one.came_from, "kind": note.kind, "path": note.path, "why": note.why}
        for one in converted
        for note in one.notes
    ]
    return {"documents": [document for one in converted for document in one.documents], "notes": notes}


def _comment(one: Converted) -> str:
    return _said(one, "# ")


def _said(one: Converted, start: str) -> str:
    lines = []
    for kind, heading in _HEADINGS.items():
        notes: list[Note] = [note for note in one.notes if note.kind == kind]
        if notes:
            lines.append(f"{one.came_from}: {heading}:")
            lines += [f"  {note.path}: {note.why}" for note in notes]
    return "".join(f"{start}{_one_line(line)}\n" for line in lines)


def _one_line(line: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in line)
