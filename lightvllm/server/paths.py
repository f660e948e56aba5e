"""Which paths need no API key, and which count as use of the API.

A path is compared exactly as the router will match it: nothing is normalised, and a proxy's prefix (``root_path``) is
taken off as Starlette takes it off. So what is not listed here needs a key, however it is written.
"""

from __future__ import annotations

from typing import Any

PROBES = frozenset({"/health", "/live", "/ping"})
"""Asked by orchestrators, which carry no key. They tell whether, and why not, requests can be answered."""

PAGES = frozenset({"/", "/docs", "/openapi.json"})
"""Pages that are the same for every server; the status page's figures are at paths that need a key."""

STATIC = "/static/"
"""What those pages are made of."""

METRICS = "/metrics"

API_PREFIXES = ("/v1/", "/tokenize", "/detokenize")
"""What rate limits count."""


def route_path(scope: Any) -> str:
    """The path that routes are matched against."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def is_open(path: str, *, metrics_without_key: bool) -> bool:
    """Whether ``path`` (as ``route_path`` gives it) needs no API key."""
    if path == METRICS:
        return metrics_without_key
    return path in PROBES or path in PAGES or path.startswith(STATIC)


def is_api(path: str) -> bool:
    return path.startswith(API_PREFIXES)
