"""Plots as inline SVG: no script, no font file, readable at phone width, colours from the page."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 24, 40
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)")


def number(x: float) -> str:
    forms = ((1e6, f"{x / 1e6:.4g}M"), (1e4, f"{x / 1e3:.4g}k"), (1e-3, f"{x:.4g}"), (1e-300, f"{x:.1e}"), (0, "0"))
    return next(form for limit, form in forms if abs(x) >= limit)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Axes:
    """Maps data to the drawing area; `log` makes the vertical axis logarithmic."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], log: bool = False):
        self.log = log and y[0] > 0
        low, high = (math.log10(v) for v in y) if self.log else y
        pad = (high - low) * 0.04 or max(abs(high), 1e-9) * 0.05
        self.x, self.y = (x[0], x[1] + (x[1] <= x[0]) * max(1, 1e-6 * abs(x[0]))), (low - pad, high + pad)

    def px(self, x: float | np.ndarray) -> float | np.ndarray:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float | np.ndarray) -> float | np.ndarray:
        y = np.log10(np.maximum(y, 1e-300)) if self.log else y
        return TOP + (self.y[1] - y) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[float]:
        low, high = self.y
        exponents = range(math.floor(low), math.floor(high) + 1) if self.log else ()
        fine = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= math.log10(m) + e <= high]
        whole = [v for v in fine if len(fine) < 9 or f"{v:e}"[0] == "1"]
        return whole if len(whole) > 2 else ticks(*(10**v if self.log else v for v in self.y))

    def frame(self, x_label: str, y_label: str) -> str:
        x_at, bottom = (LEFT + WIDTH) / 2, HEIGHT - BOTTOM + 15
        parts = [label(self.px(v), bottom, number(v), "middle") for v in ticks(*self.x)]
        for v in self.y_ticks():
            y = self.py(v)
            parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(label(LEFT - 5, y + 4, number(v), "end"))
        return "".join([*parts, label(x_at, HEIGHT - 6, x_label, "middle"), label(4, 10, y_label)])


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="t" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(body: str, title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def points(axes: Axes, x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(axes.px(x), axes.py(y)))


Series = tuple[str, Sequence[float], Sequence[float]]


def lines(
    title: str,
    series: list[Series],
    x_label: str,
    y_label: str,
    *,
    band: tuple | None = None,
    log: bool = False,
    marks: Sequence = (),
    dots: frozenset = frozenset(),
) -> str:
    """A line chart; `band` is (x, low, high) behind the lines, `marks` are red points, `dots` names dotted series."""
    arrays = [(name, np.asarray(x, float), np.asarray(y, float)) for name, x, y in series]
    good = [np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log)) for _, x, y in arrays]
    drawn = [(name, x[fit], y[fit]) for (name, x, y), fit in zip(arrays, good) if fit.any()]
    if max((len(x) for _, x, _ in drawn), default=0) < 2:
        return ""
    xs, ys = (np.concatenate([d[i] for d in drawn]) for i in (1, 2))
    bx, low, high = (np.asarray(v, float) for v in band or (xs[:0], ys[:0], ys[:0]))
    bottom = min(ys.min(), np.quantile(low, 0.01) if len(low) else np.inf)
    inside = [(a, b) for a, b in marks if math.isfinite(a) and math.isfinite(b) and xs.min() <= a <= xs.max()]
    top = max(ys.max(), np.quantile(high, 0.99) if len(high) else -np.inf, *(b for _, b in inside))
    axes = Axes((xs.min(), xs.max()), (bottom, top), log)
    low, high = np.clip(low, bottom, top), np.clip(high, bottom, top)
    area = f'<polygon class="band" points="{points(axes, bx, high)} {points(axes, bx[::-1], low[::-1])}"/>'
    body = [axes.frame(x_label, y_label), area * bool(len(bx))]
    for i, (name, x, y) in enumerate(drawn):
        colour = COLOURS[i % len(COLOURS)]
        body.append(f'<polyline class="l" style="stroke:{colour}" points="{points(axes, x, y)}"/>')
        if name in dots or len(x) == 1:
            body += [circle(axes, a, b, f'r="3" style="fill:{colour}"') for a, b in zip(x, y)]
    body += [circle(axes, a, b, 'class="mark" r="4"') for a, b in inside]
    return svg("".join([*body, legend([d[0] for d in drawn])]), title)


def circle(axes: Axes, x: float, y: float, look: str) -> str:
    return f'<circle cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" {look}/>'


def legend(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    parts, right = [], WIDTH - RIGHT
    for i, name in reversed(list(enumerate(names))):
        right -= 6.2 * len(name) + 20
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<rect x="{right:.0f}" y="2" width="9" height="9" style="fill:{colour}"/>')
        parts.append(label(right + 13, 11, name))
    return "".join(parts)
