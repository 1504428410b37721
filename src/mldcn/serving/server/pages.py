"""The server's pages: one to try a request by hand, and the description of all calls.

They are the same for everybody, so that they need no token; the calls that they make do. They load nothing from
elsewhere, run no script but their own, and write texts as texts.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# Path: the files that make it up.
_FILES = {
    "/": ("serving/server/page/try.html",),
    "/docs": ("serving/server/page/docs.html",),
    "/page/page.css": ("report/page.css", "serving/server/page/page.css"),
    "/page/calls.js": ("serving/server/page/calls.js",),
    "/page/try.js": ("serving/server/page/try.js",),
    "/page/docs.js": ("serving/server/page/docs.js",),
}
PATHS = frozenset(_FILES)


def add(app: FastAPI) -> None:
    """Adds the pages to an application."""
    for path, files in _FILES.items():
        _add(app, path, files)


def _add(app: FastAPI, path: str, files: tuple[str, ...]) -> None:
    package = resources.files("mldcn")
    content = "\n".join(package.joinpath(file).read_text(encoding="utf-8") for file in files).encode()
    kind = f"{_KINDS[files[0].rpartition('.')[2]]}; charset=utf-8"

    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
