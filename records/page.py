"""One self-contained HTML page: style inside, nothing fetched, no script, every text escaped."""

import re
from html import escape
from pathlib import Path

from records.files import clean

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d*(?:e[-+]?\d+)?%?|nan")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Raw(str):
    """Markup that this package made itself."""


def cell(value: object) -> str:
    match value:
        case Raw():
            return value
        case float() if value.is_integer() and abs(value) < 1e15:
            return f"{int(value):,}"
        case int() | float() if not isinstance(value, bool):
            return f"{value:,.8g}" if isinstance(value, float) else f"{value:,}"
    return escape("" if value is None else clean(value, 2_000))


def table(head: list[str], rows: list[list]) -> Raw:
    right = [all(NUMBER.fullmatch(str(r[i] if r[i] is not None else "")) for r in rows) for i in range(len(head))]
    mark = [' class="n"' * r for r in right]
    top = "".join(f"<th{m}>{escape(h)}</th>" for h, m in zip(head, mark))
    body = "".join("<tr>" + "".join(f"<td{m}>{cell(v)}</td>" for v, m in zip(row, mark)) + "</tr>" for row in rows)
    whole = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return Raw(whole * bool(rows))


def coloured(status: object) -> Raw:
    return Raw(f'<span class="{status}">{status}</span>' * (status in ("pass", "warn", "fail", "na")))


def figure(caption: str, drawing: str) -> Raw:
    return Raw(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" * bool(drawing))


def grid(*figures: str) -> Raw:
    return Raw(f'<div class="grid">{"".join(figures)}</div>' * any(figures))


def tiles(rows: list[list[str]]) -> Raw:
    parts = [f'<div class="tile"><b>{cell(value)}</b><span>{escape(name)}</span></div>' for name, value in rows]
    return Raw(f'<div class="tiles">{"".join(parts)}</div>')


def folded(title: str, body: Raw) -> Raw:
    return Raw(f"<details><summary>{title}</summary>{body}</details>" * bool(body))


def section(title: str, *parts: str) -> Raw:
    body = "".join(parts)
    return Raw(f"<section><h2>{escape(title)}</h2>{body}</section>" * bool(body))


def page(title: str, body: str) -> str:
    safe = escape(clean(title))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{safe}</title><style>{STYLE}</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{safe}</h1>{body}</body></html>\n'


def picture(drawing: str) -> str:
    """A drawing as a file of its own, which a Markdown page can show: its colours come with it."""
    head, _, body = drawing.partition(">")
    space = '<rect width="100%" height="100%" style="fill:var(--card)"/>'
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}svg{{font-family:sans-serif}}</style>{space}{body}\n'
    )
