"""Small figures as SVG, in the page's own colours, light or dark; every text is escaped."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

STYLE = """
:root{--ink:#1d2329;--soft:#5c6670;--line:#d5dadf;--page:#fff;--card:#f6f7f9;--warn:#b3261e;
--a:#0b6bcb;--b:#d9730d;--c:#2e8b57;--d:#8a4fbf;--e:#7a8a99}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3abb3;--line:#3a4148;--page:#15181b;--card:#1e2226;
--warn:#ff8a80;--a:#62aef7;--b:#f2a154;--c:#6fcf97;--d:#c39bf0;--e:#93a1ad}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.about td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem;margin:1rem 0}
figure{margin:0;padding:.7rem;background:var(--card);border-radius:8px}
figcaption{font-weight:600;margin-bottom:.3rem}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}
svg .soft{fill:var(--soft)}
svg .axis{stroke:var(--line)}
.notes,.verdicts{padding-left:1.2rem;overflow-wrap:anywhere}
.notes{color:var(--soft);font-size:.9rem}
@media(max-width:600px){th,td{padding:.25rem .4rem;font-size:13px}}
.warn{color:var(--warn);font-weight:600}
"""
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")
_WIDTH, _LEFT, _ROW = 360, 96, 44
_ROOM = _WIDTH - _LEFT - 62


def _tag(name: str, **attributes: object) -> str:
    """An element; numbers to a tenth of a unit, and what is text escaped."""
    told = (f"{v:.1f}" if isinstance(v, float) else escape(str(v), quote=True) for v in attributes.values())
    names = (key.rstrip("_").replace("_", "-") for key in attributes)
    pairs = " ".join(f"{key}='{value}'" for key, value in zip(names, told, strict=True))
    return f"<{name} {pairs}/>"


def _figure(title: str, height: float, content: str) -> str:
    name = escape(title, quote=True)
    drawn = f"<svg viewBox='0 0 {_WIDTH} {height:.0f}' role=img aria-label='{name}'>{content}</svg>"
    return f"<figure><figcaption>{name}</figcaption>{drawn}</figure>"


def _label(text: str, x: float, y: float, anchor: str = "start", soft: bool = False) -> str:
    kind = " class=soft" if soft else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor={anchor}{kind}>{escape(text)}</text>"


def _name(arm: str, y: float) -> str:
    return _label(arm if len(arm) < 15 else arm[:13] + "…", 4, y + 18)


def spans(title: str, values: Mapping[str, Sequence[float]], write: Callable[[float], str]) -> str:
    """A bar to the mean of each arm, with every repeat as a dot: on so few, that says more than an interval."""
    most = max(max(some) for some in values.values())
    content = ""
    for row, (arm, some) in enumerate(values.items()):
        y, mean, colour = row * _ROW + 8, sum(some) / len(some), _COLOURS[row % len(_COLOURS)]
        content += _name(arm, y)
        content += _tag("rect", x=_LEFT, y=y, width=mean / most * _ROOM, height=26, fill=colour, opacity=".55", rx=3)
        for value in some:
            content += _tag("circle", cx=_LEFT + value / most * _ROOM, cy=y + 13, r=3, fill=colour)
        content += _label(write(mean), _LEFT + _ROOM + 8, y + 18)
    return _figure(title, len(values) * _ROW + 6, content)


def stacks(title: str, parts: Mapping[str, Mapping[str, float]], write: Callable[[float], str]) -> str:
    """Bars made of parts."""
    most = max(sum(some.values()) for some in parts.values())
    content = ""
    for row, (arm, some) in enumerate(parts.items()):
        y, x = row * _ROW + 8, float(_LEFT)
        content += _name(arm, y)
        for place, value in enumerate(some.values()):
            width = value / most * _ROOM
            content += _tag("rect", x=x, y=y, width=width, height=26, fill=_COLOURS[place], opacity=".75")
            x += width
        content += _label(write(sum(some.values())), _LEFT + _ROOM + 8, y + 18)
    y, x = len(parts) * _ROW + 14, 4.0
    longest: list[str] = max((list(some) for some in parts.values()), key=len)
    for place, name in enumerate(longest):
        if x + 14 + 7 * len(name) > _WIDTH:
            y, x = y + 18, 4.0
        content += _tag("rect", x=x, y=y - 9, width=10, height=10, fill=_COLOURS[place], opacity=".75")
        content += _label(name, x + 14, y, soft=True)
        x += 24 + 7 * len(name)
    return _figure(title, y + 8, content)


def curves(title: str, values: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Every repeat of every arm, laid over each other: the same training is one line."""
    flat = [v for some in values.values() for line in some for v in line]
    low, high = min(flat), max(flat)
    length = max(len(line) for some in values.values() for line in some)
    height, top, left, right = 190, 12, 44, _WIDTH - 12
    bottom = height - 36

    def place(step: int, value: float) -> str:
        x = left + (right - left) * step / max(1, length - 1)
        return f"{x:.1f},{top + (bottom - top) * (1 - (value - low) / max(high - low, 1e-9)):.1f}"

    content = _tag("line", class_="axis", x1=left, y1=bottom, x2=right, y2=bottom)
    content += _label(f"{high:.2f}", left - 6, top + 6, "end", True)
    content += _label(f"{low:.2f}", left - 6, bottom - 2, "end", True)
    content += _label("step 1", left, bottom + 14, "start", True) + _label(str(length), right, bottom + 14, "end", True)
    for row, (arm, some) in enumerate(values.items()):
        how = {"stroke": _COLOURS[row % len(_COLOURS)], "stroke_width": 2}
        if row:
            how["stroke_dasharray"] = f"{3 + 2 * row} 4"
        for line in some:
            points = " ".join(place(step, value) for step, value in enumerate(line))
            content += _tag("polyline", points=points, fill="none", **how)
        x = left + row * 100
        content += _tag("line", x1=x, y1=height - 6, x2=x + 18, y2=height - 6, **how)
        content += _label(arm, x + 23, height - 2)
    return _figure(title, height + 4, content)


def dots(title: str, values: Mapping[str, Sequence[float]], write: Callable[[float], str]) -> str:
    """Every value as a dot, from zero, with the median as a line."""
    most = max(max(some) for some in values.values())
    content = ""
    for row, (arm, some) in enumerate(values.items()):
        y, colour = row * _ROW + 8, _COLOURS[row % len(_COLOURS)]
        content += _name(arm, y)
        for place, value in enumerate(some):
            # Spread out by a fixed pattern, so that equal values do not hide each other.
            across, down = _LEFT + value / most * _ROOM, y + 3 + place * 7 % 21
            content += _tag("circle", cx=across, cy=down, r=2, fill=colour, opacity=".5")
        median = sorted(some)[len(some) // 2]
        x = _LEFT + median / most * _ROOM
        content += _tag("line", x1=x, y1=y - 2, x2=x, y2=y + 28, stroke="var(--ink)", stroke_width=2)
        content += _label(write(median), _LEFT + _ROOM + 8, y + 18)
    return _figure(title, len(values) * _ROW + 6, content)
