"""One self-contained HTML page: style inside, nothing fetched, no script, every text escaped."""

from html import escape

from records.files import clean

STYLE = """
:root{--bg:#fff;--fg:#1a1d21;--dim:#667;--line:#dde1e6;--card:#f7f8fa;--a:#2166ac;--b:#d6604d;--c:#4d9221;--d:#8856a7;--e:#b8860b;--f:#018571;
--pass:#1a7f37;--warn:#9a6700;--fail:#cf222e;--na:#8b949e}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e7eb;--dim:#98a2b0;--line:#2c323a;--card:#1b2026;--a:#6cabe8;--b:#f0907f;--c:#8cc665;
--d:#c39bd3;--e:#e3b341;--f:#4cc9b8;--pass:#4ac26b;--warn:#d4a72c;--fail:#ff7b72;--na:#8b949e}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1180px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2em 0}
h2{font-size:1.12rem;margin:1.8em 0 .5em;border-bottom:1px solid var(--line);padding-bottom:.2em}
p{margin:.5em 0}.dim{color:var(--dim)}a{color:var(--a)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:8px;margin:1em 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 10px}
.tile b{display:block;font-size:1.12rem}
.tile span{color:var(--dim);font-size:.8rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px;align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px}
figcaption{font-size:.85rem;color:var(--dim);padding:0 4px 4px}
svg{width:100%;height:auto;display:block}.t{font-size:11px;fill:var(--dim)}.g{stroke:var(--line)}.l{fill:none;stroke-width:1.6}
.band{fill:var(--a);opacity:.16}.mark{fill:var(--fail)}.spark{width:100px;height:24px}
.scroll{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.86rem;min-width:min(100%,340px)}
th,td{text-align:left;padding:3px 8px;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:normal}
details td:nth-child(n+4):not(.n){min-width:9rem}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{color:var(--dim);font-weight:600}
details{margin:.5em 0}summary{cursor:pointer}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;
overflow-x:auto;white-space:pre-wrap;font-size:.82rem}code{font-size:.85em}
.pass{color:var(--pass)}.warn{color:var(--warn)}.fail{color:var(--fail)}.na{color:var(--na)}.flag{color:var(--fail);font-weight:600}
"""
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
    """Columns of numbers align right."""
    right = [all(isinstance(r[i], int | float) or r[i] in ("", None) for r in rows) for i in range(len(head))]
    mark = [' class="n"' * r for r in right]
    top = "".join(f"<th{m}>{escape(h)}</th>" for h, m in zip(head, mark))
    body = "".join("<tr>" + "".join(f"<td{m}>{cell(v)}</td>" for v, m in zip(row, mark)) + "</tr>" for row in rows)
    whole = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return Raw(whole * bool(rows))


def coloured(status: object) -> Raw:
    """A verdict in its colour."""
    return Raw(f'<span class="{status}">{status}</span>' * (status in ("pass", "warn", "fail", "na")))


def figure(caption: str, drawing: str) -> Raw:
    return Raw(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" * bool(drawing))


def grid(*figures: str) -> Raw:
    return Raw(f'<div class="grid">{"".join(figures)}</div>' * any(figures))


def tiles(rows: list[list[str]]) -> Raw:
    parts = [f'<div class="tile"><b>{cell(value)}</b><span>{escape(name)}</span></div>' for name, value in rows]
    return Raw(f'<div class="tiles">{"".join(parts)}</div>')


def folded(title: str, body: Raw, unfolded: bool = False) -> Raw:
    return Raw(f"<details{' open' * unfolded}><summary>{title}</summary>{body}</details>" * bool(body))


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
