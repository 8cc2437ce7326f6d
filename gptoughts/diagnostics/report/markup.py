"""Build HTML from elements. Text is escaped, always: names, settings and samples come from files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any


class Markup(str):
    """Finished HTML. Any other text is escaped where it enters an element."""


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element. `class_` is the attribute class; an underscore in a name is a hyphen; None leaves an attribute out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return Markup(f"<{name}{words}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Return children one after another; those that are not Markup are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children))


def table(head: Iterable[object], rows: Iterable[Iterable[object]], class_: str | None = None) -> Markup:
    """Return a table whose first column names the rows."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element(
            "tr",
            *(element("td" if place else "th", cell, **({} if place else {"scope": "row"})) for place, cell in enumerate(row)),
        )
        for row in rows
    ]
    # Wide tables scroll inside their own box, so that the page does not on a phone.
    return element("div", element("table", element("thead", top), element("tbody", *body), class_=class_), class_="scroll")


def json_block(identity: str, value: Any) -> Markup:
    """Return data for a script. `<` is written as an escape, so that no text can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return Markup(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')
