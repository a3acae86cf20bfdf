"""A page about every path, made of the schema: it needs nothing from elsewhere, not even a script."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 0; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8884; }
@media (max-width: 32rem) { td { display: block; padding: 0; border: 0; } td:first-child { padding-top: .5rem; } }
"""


def reference_page(schema: dict[str, Any]) -> str:
    """HTML of an OpenAPI schema: paths, what they take, what they give.

    Args:
        schema: as FastAPI makes it.
    """
    title = escape(schema["info"]["title"])
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>',
        f"<h1>{title}</h1><p>{escape(schema['info']['description'])} The schema itself: <code>openapi.json</code>.</p>",
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            content = operation.get("requestBody", {}).get("content", {})
            parts += [_fields("Takes", schema, part["schema"]) for part in content.values()]
            for status, response in operation["responses"].items():
                if status != "200":
                    continue
                parts += [_fields("Gives", schema, part.get("schema", {})) for part in response.get("content", {}).values()]
            others = [
                f"<li>{escape(status)}: {escape(response['description'])}</li>"
                for status, response in operation["responses"].items()
                if status != "200"
            ]
            parts.append(f"<ul>{''.join(others)}</ul>" if others else "")
    return "\n".join([*parts, "</html>"])


def _fields(what: str, schema: dict[str, Any], form: dict[str, Any]) -> str:
    """Tables of the objects that a form speaks of."""
    tables = []
    for name in _names(form):
        of_all = schema["components"]["schemas"]
        rows = [
            f"<tr><td><code>{escape(field)}</code><td>{escape(_words(one))}<td>{escape(one.get('description', ''))}"
            for field, one in of_all[name].get("properties", {}).items()
        ]
        about = escape(of_all[name].get("description", ""))
        tables.append(f"<p><b>{what} {escape(name)}</b>: {about}</p><table>{''.join(rows)}</table>")
    return "".join(tables)


def _names(form: Any) -> list[str]:
    """Objects that a form speaks of, in order, each once."""
    if isinstance(form, dict):
        if "$ref" in form:
            return [form["$ref"].rpartition("/")[2]]
        return list(dict.fromkeys(name for value in form.values() for name in _names(value)))
    return list(dict.fromkeys(name for one in form for name in _names(one))) if isinstance(form, list) else []


def _words(form: dict[str, Any]) -> str:
    """A field's type in words, with its default where it has one."""
    kinds = [_words(one) for one in form.get("anyOf", ())] or [
        _names(form)[0] if "$ref" in form else str(form.get("type", ""))
    ]
    if form.get("type") == "array":
        kinds = [f"list of {_words(form.get('items', {}))}"]
    if "enum" in form or "const" in form:
        kinds = [" or ".join(map(repr, form.get("enum", [form.get("const")])))]
    words = " or ".join(dict.fromkeys(kinds))
    return f"{words}; default {form['default']!r}" if form.get("default") is not None else words
