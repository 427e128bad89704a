"""HTML elements as text in which nothing foreign can become an element: every string is escaped unless it was made
here."""

from __future__ import annotations

import html
from collections.abc import Iterable

from smalllm.terminal import plain

VOID = {"meta", "br", "col", "line", "path", "circle", "rect", "polyline"}
"""Elements that have no content."""


class Markup(str):
    """Text that is HTML already. Only ``element`` and ``joined`` make it of others' text."""


def element(tag: str, *content: str | int, **attributes: str | float | None) -> Markup:
    """An element. Content that is no Markup is escaped, attributes always are; ``class_`` is class, ``stroke_width``
    stroke-width; an attribute of None is left out.

    >>> element("p", "a < b", element("b", "&"), class_='"x"')
    '<p class="&quot;x&quot;">a &lt; b<b>&amp;</b></p>'
    """
    given = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None]
    written = "".join(f' {name}="{html.escape(plain(_attribute(value)))}"' for name, value in given)
    if tag in VOID and not content:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{joined(content)}</{tag}>")


def joined(parts: Iterable[str | int]) -> Markup:
    """Parts one after the other, each escaped unless it is Markup."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(plain(str(part))) for part in parts))


def _attribute(value: str | float) -> str:
    return (
        value
        if isinstance(value, str)
        else f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(value)
    )
