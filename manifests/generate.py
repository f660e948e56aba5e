"""Writes what is made from lightvllm/operator: ``python manifests/generate.py``; ``--check`` only compares (status 1).

manifests/base/crd.yaml is the CRD. The tables of fields in docs/kubernetes.md stand between two comments there.
Needs the operator extra.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightvllm.operator import crd, text

ROOT = Path(__file__).resolve().parent.parent
CRD = ROOT / "manifests/base/crd.yaml"
PAGE = ROOT / "docs/kubernetes.md"
BEGIN, END = "<!-- fields: made by manifests/generate.py -->", "<!-- end of fields -->"


def generated() -> dict[Path, str]:
    """Each file and what it should hold."""
    made = "# Made from lightvllm/operator/types.py by: make crd\n" + text.dump([crd.definition()])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {CRD: made, PAGE: f"{before}{BEGIN}\n{fields()}{END}{after}"}


def fields() -> str:
    """The tables: one for the spec, and one for each object in it, in the order of the types."""
    spec = crd.schema()["properties"]["spec"]
    return "".join(_tables("spec", spec))


def _tables(path: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"\n### `{path}`\n\n| Field | Type | Default | |\n|---|---|---|---|\n"
    below = []
    for name, field in schema["properties"].items():
        yield f"| `{name}` | {_type(field)} | {_default(name, field, schema)} | {field['description']} |\n"
        item = field.get("items", field)
        if "properties" in item:
            below.append((f"{path}.{name}" + ("[]" if "items" in field else ""), item))
    for each in below:
        yield from _tables(*each)


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "items" in field:
        return f"list of {_type(field['items'])}s"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}s"
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    bounds = [str(field[key]) for key in ("minimum", "maximum") if key in field]
    return field["type"] + (f", {' to '.join(bounds)}" if len(bounds) == 2 else "")


def _default(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    default = field.get("default")
    if default is None or default == [] or isinstance(default, dict):  # an object has its own table
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    wrong = [path for path, made in generated().items() if not path.exists() or path.read_text("utf-8") != made]
    if sys.argv[1:] == ["--check"]:
        for path in wrong:
            sys.stderr.write(f"{path.relative_to(ROOT)} is not what lightvllm/operator says; run: make crd\n")
        sys.exit(1 if wrong else 0)
    for path in wrong:
        path.write_text(generated()[path], encoding="utf-8")
