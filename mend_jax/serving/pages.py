"""The server's two pages: to try it, and its reference. Neither loads anything from elsewhere."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import NamedTuple

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


class Page(NamedTuple):
    """An HTML page and the headers it is sent with."""

    html: str
    headers: dict[str, str]


def home() -> Page:
    """The page at /."""
    return _page(Path(__file__).with_name("home.html").read_text(encoding="utf-8"))


def reference(openapi: dict) -> Page:
    """The paths of an OpenAPI description, readable without scripts."""
    schemas = openapi.get("components", {}).get("schemas", {})
    parts = [
        _operation(method, path, operation, schemas)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    style = (
        Path(__file__)
        .with_name("home.html")
        .read_text(encoding="utf-8")
        .partition("<style>")[2]
        .partition("</style>")[0]
    )
    errors = "".join(
        f"<tr><th><code>{code}</code><td>{_text(said['description'])}" for code, said in _errors(openapi).items()
    )
    return _page(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>MEND-JAX: reference</title><style>{style}</style><main><h1>Reference</h1>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>. <a href=".">Try it</a>.</p>'
        f"{''.join(parts)}<h2>Errors</h2><p>An error is <code>{{&quot;error&quot;: a sentence}}</code> with one of these codes.</p>"
        f"<table>{errors}</table></main></html>"
    )


def _errors(openapi: dict) -> dict[str, dict]:
    """The error codes that all operations share."""
    operations = [operation for methods in openapi["paths"].values() for operation in methods.values()]
    found = {code: said for one in operations for code, said in one["responses"].items() if code >= "400"}
    return dict(sorted(found.items()))


def _operation(method: str, path: str, operation: dict, schemas: dict) -> str:
    bodies = operation.get("requestBody", {}).get("content", {})
    shown = "".join(
        f"<p>Body, <code>{html.escape(kind)}</code>:</p>{_schema(one.get('schema', {}), schemas)}"
        for kind, one in bodies.items()
    )
    said = _text(operation.get("description", ""))
    answer = operation["responses"].get("200", {})
    for kind, one in answer.get("content", {}).items():
        if "example" in one:
            shown += f"<p>Answer, <code>{html.escape(kind)}</code>: {_text(answer['description'])}</p><pre>{html.escape(json.dumps(one['example']))}</pre>"
    return f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{said}</p>{shown}</section>"


def _schema(schema: dict, schemas: dict) -> str:
    """The fields of a body."""
    named = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    fields = named.get("properties")
    if not fields:
        return f"<p>{_text(schema.get('description', ''))}</p>"
    required = named.get("required", [])
    rows = []
    for name, field in fields.items():
        default = "required" if name in required else f"default {json.dumps(field.get('default'))}"
        said = _text(f"{field.get('description', '')} ({_type(field)}; {default})")
        rows.append(f"<tr><th><code>{html.escape(name)}</code><td>{said}")
    return f"<table>{''.join(rows)}</table>"


def _text(said: str) -> str:
    """A description, in which code stands between backquotes."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(said))


def _type(field: dict) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "enum" in field:
        return " or ".join(map(json.dumps, field["enum"]))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    inner = f" of {_type(field['items'])}" if "items" in field else ""
    return field.get("type", "anything") + inner


def _page(text: str) -> Page:
    """A page that may run its own script and ask its own server, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _SCRIPT.findall(text)]
    scripts = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return Page(text, {"Content-Security-Policy": policy})
