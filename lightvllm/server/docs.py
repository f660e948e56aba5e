"""``/docs``: Swagger UI over ``/openapi.json``, all of it from this server.

The bundle is the package ``fastapi-swagger``'s, of which only the files are used: a closed cluster reaches no CDN, and
a page in which keys are typed shall run no script from elsewhere.
"""

from __future__ import annotations

import functools
import html
from importlib import resources

from fastapi import APIRouter, Request, Response

from lightvllm.errors import MissingExtra
from lightvllm.server.status import page_headers, root_of, static_text

_HEADERS = page_headers("img-src 'self' data:")  # the bundle's style sheet draws its arrows so
_TYPES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    _file("swagger-ui.css")  # what is missing is told here, not by an empty page
    text = static_text("docs.html").replace("{{root}}", html.escape(root_of(request), quote=True))
    return Response(text, media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.get("/static/swagger-ui-bundle.js", include_in_schema=False)
async def bundle() -> Response:
    return _written("swagger-ui-bundle.js")


@router.get("/static/swagger-ui.css", include_in_schema=False)
async def style() -> Response:
    return _written("swagger-ui.css")


def _written(name: str) -> Response:
    headers = _HEADERS | {"Cache-Control": "public, max-age=3600"}
    return Response(_file(name), media_type=_TYPES[name], headers=headers)


@functools.cache
def _file(name: str) -> bytes:
    """Two megabytes in all, read once."""
    try:
        return resources.files("fastapi_swagger").joinpath("resources", name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingExtra("fastapi-swagger", "server", "/docs") from None
