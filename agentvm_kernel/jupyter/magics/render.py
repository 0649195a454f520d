"""Draws the outputs of several machines side by side, as HTML and as text.

The guests are hostile: everything that they say is escaped, of their HTML only the elements of tables and text survive, and images are
shown as images. Standard library only.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

MAX_COLUMN = 256 * 1024
"""So many characters of one machine's output are shown."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
_ELEMENTS = frozenset(
    [
        "table",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "th",
        "td",
        "caption",
        "b",
        "i",
        "em",
        "strong",
        "code",
        "pre",
        "p",
        "br",
        "hr",
        "ul",
        "ol",
        "li",
        "sub",
        "sup",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "span",
        "div",
    ]
)
_EMPTY_ELEMENTS = frozenset({"br", "hr"})
_HIDDEN_ELEMENTS = frozenset({"style", "script", "title", "template", "iframe", "object", "textarea"})
_NUMBERS = frozenset({"colspan", "rowspan"})


@dataclass
class Column:
    """One machine's outputs.

    Attributes:
        title: above them.
        state: in a word or two, such as "running".
        outputs: in the form of nbformat's.
    """

    title: str
    state: str = "starting"
    outputs: Sequence[dict[str, Any]] = field(default_factory=list)


def as_html(columns: Sequence[Column]) -> str:
    """Return the columns side by side."""
    drawn = "".join(
        '<div style="flex:1 1 16em;min-width:12em;overflow-x:auto;border-left:2px solid var(--jp-border-color2,#ccc);padding:0 .8em">'
        f"<div><b>{html.escape(column.title)}</b> <small>{html.escape(column.state)}</small></div>"
        f"{''.join(_limited([_output_html(output) for output in column.outputs]))}</div>"
        for column in columns
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:.5em;align-items:flex-start">{drawn}</div>'


def as_text(columns: Sequence[Column]) -> str:
    """Return the columns one below the other."""
    blocks = []
    for column in columns:
        text = "".join(_limited([_output_text(output) for output in column.outputs])).rstrip("\n")
        blocks.append(f"── {column.title} ({column.state}) ──" + (f"\n{text}" if text else ""))
    return "\n".join(blocks)


def _limited(pieces: list[str]) -> list[str]:
    """Drop whole pieces beyond MAX_COLUMN: half an element would swallow what follows it."""
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_COLUMN and kept:
            return [*kept, "…\n"]
        kept.append(piece)
    return kept


def _output_text(output: dict[str, Any]) -> str:
    kind = output.get("output_type")
    if kind == "stream":
        text = plain(str(output.get("text", "")))
    elif kind == "error":
        text = f"{output.get('ename')}: {output.get('evalue')}\n"
    else:
        text = f"{_data(output).get('text/plain', '')}\n"
    return text[:MAX_COLUMN]


def _output_html(output: dict[str, Any]) -> str:
    kind = output.get("output_type")
    if kind == "error":
        lines = "\n".join(
            str(line) for line in output.get("traceback") or [f"{output.get('ename')}: {output.get('evalue')}"]
        )
        return _pre(lines, "color:var(--jp-error-color1,#b00)")
    if kind == "stream":
        style = "background:var(--jp-rendermime-error-background,#fdd)" if output.get("name") == "stderr" else ""
        return _pre(str(output.get("text", "")), style)
    data = _data(output)
    for mime in ("image/png", "image/jpeg", "image/gif"):
        picture = data.get(mime)
        if isinstance(picture, str) and _BASE64.fullmatch(picture):
            return f'<img style="max-width:100%" src="data:{mime};base64,{"".join(picture.split())}">'
    markup = data.get("text/html")
    if isinstance(markup, str) and len(markup) <= MAX_COLUMN:
        return clean_html(markup)
    return _pre(str(data.get("text/plain", "")), "")


def _data(output: dict[str, Any]) -> dict[str, Any]:
    data = output.get("data")
    return data if isinstance(data, dict) else {}


def _pre(text: str, style: str) -> str:
    shown = plain(text)
    if len(shown) > MAX_COLUMN:
        shown = f"{shown[:MAX_COLUMN]}…"
    return f'<pre style="white-space:pre-wrap;margin:.2em 0;{style}">{html.escape(shown)}</pre>'


def plain(text: str) -> str:
    """Return text as it looks in the end: without colours, and where a line was written over, its last version."""
    text = _ANSI.sub("", text).replace("\r\n", "\n")
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return text


def clean_html(markup: str) -> str:
    """Return markup of which only harmless elements are left, without attributes but the spans of table cells."""
    cleaner = _Cleaner()
    cleaner.feed(markup)
    cleaner.close()
    return "".join(cleaner.kept) + "".join(f"</{tag}>" for tag in reversed(cleaner.open))


class _Cleaner(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.kept: list[str] = []
        self.open: list[str] = []
        self._hidden = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            return
        if tag in _HIDDEN_ELEMENTS:
            self._hidden = tag
        elif tag in _ELEMENTS:
            numbers = "".join(
                f' {name}="{value}"'
                for name, value in attrs
                if name in _NUMBERS and value and re.fullmatch(r"[0-9]{1,4}", value)
            )
            self.kept.append(f"<{tag}{numbers}>")
            if tag not in _EMPTY_ELEMENTS:
                self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag == self._hidden:
                self._hidden = ""
        elif tag in self.open:
            while (closing := self.open.pop()) != tag:
                self.kept.append(f"</{closing}>")
            self.kept.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.kept.append(html.escape(data))
