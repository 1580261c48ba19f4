"""What FastAPI does not see, for the description at /openapi.json: objects, and the protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_BINARY: dict[str, Any] = {"application/octet-stream": {}}


def _path(name: str, what: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "description": what, "schema": schema}


def _field(name: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}


_NOT = {
    "304": {"description": "not modified"},
    "400": {"description": "no HTTP request, or a head over 32 KiB; the connection ends"},
    "403": {"description": "the server may not read the file"},
    "404": {"description": "no such object, or it is damaged"},
    "503": {"description": "the file changes this moment: come again"},
}
_RANGED = {
    "200": {"content": _BINARY, "description": "the whole object"},
    "206": {"content": _BINARY, "description": "the ranges that were asked for"},
    "416": {"description": "all ranges lie outside"},
    **_NOT,
}
_REPOSITORY = _path("repository", "the repository's path; its slashes are not encoded")
_CONDITIONS = [_field("If-None-Match"), _field("If-Modified-Since")]
_RANGE = [_field("Range"), _field("If-Range")]


def _operation(summary: str, parameters: list[Any], responses: dict[str, Any]) -> dict[str, Any]:
    def by(method: str) -> dict[str, Any]:
        return {
            "summary": summary,
            "operationId": f"{method}: {summary}",
            "parameters": parameters,
            "responses": responses,
        }

    return {"get": by("get"), "head": by("head")}


OBJECTS: dict[str, Any] = {
    "/{repository}/tidings/head.json": _operation(
        "The head, with this server's features",
        [_REPOSITORY, *_CONDITIONS],
        {"200": {"content": {"application/json": {}}, "description": "the head"}, **_NOT},
    ),
    "/{repository}/tidings/{pack}": _operation(
        "A pack, or one range of it",
        [_REPOSITORY, _path("pack", "as in the head"), *_CONDITIONS, *_RANGE],
        _RANGED,
    ),
    "/{file}": _operation(
        "A published file, or ranges of it",
        [_path("file", "its path below the root; slashes are not encoded"), *_CONDITIONS, *_RANGE],
        _RANGED,
    ),
}

#: What each route may answer before it is reached.
ALL = {
    "400": {"description": "no HTTP request, or a head over 32 KiB; the connection ends"},
    "405": {"description": "another method than GET and HEAD where the path names no route"},
}


def with_objects(described: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """*described*, FastAPI's description of the routes, with objects beside them."""

    def whole() -> dict[str, Any]:
        found = described()
        paths = {path: dict(item) for path, item in found["paths"].items()}
        for item in paths.values():
            for method, operation in item.items():
                if method in ("get", "head", "post"):
                    responses = {**ALL, **operation.get("responses", {})}
                    item[method] = {**operation, "responses": responses}
        return {**found, "paths": {**paths, **OBJECTS}}

    return whole
