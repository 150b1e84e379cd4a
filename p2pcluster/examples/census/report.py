"""How the census looks: a table for a terminal, and one HTML page that needs nothing but itself.

Knows nothing of pipelines, databases or files: figures go in, text comes out. Whatever came from disk or source is
escaped on its way into the page, which asks for nothing over the network and forbids it besides.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from store import Figures, Function, Package, Unparsed

LONGEST_MAX = 15  # as tall as the packages beside it
_PACKAGES_MAX = 24  # the rest, each of a few modules, share one bar

_WIDTH = 520  # of a chart in one of two columns
_WIDE = 1088  # of a chart across both


def table(figures: Figures, python: str, root: str) -> str:
    """The totals, a line each."""
    rows = (
        ("files", _number(figures.totals["files"])),
        ("lines", _number(figures.totals["lines"])),
        ("functions", _number(figures.totals["functions"])),
        ("classes", _number(figures.totals["classes"])),
        ("did not parse", _number(figures.totals["unparsed"])),
        ("time taken", _duration(figures.duration_s)),
    )
    label_width = max(len(label) for label, _ in rows)
    value_width = max(len(value) for _, value in rows)
    head = f"Census of the Python {python} source in {root}"
    return "\n".join([head, *(f"  {label:<{label_width}}  {value:>{value_width}}" for label, value in rows)])


def page(figures: Figures, python: str, root: str) -> str:
    """The whole page."""
    return _PAGE.format(
        style=_STYLE,
        title=_text(f"Census of Python {python}"),
        python=_text(python),
        root=_text(root),
        tiles=_tiles(figures),
        lengths=_lengths_section(figures.function_counts),
        longest=_longest_section(figures.longest),
        packages=_packages_section(figures.packages),
        unparsed=_unparsed_section(figures.unparsed),
    )


def _tiles(figures: Figures) -> str:
    totals = figures.totals
    return "".join(
        f'<div class="tile"><dt>{label}</dt><dd>{value}</dd></div>'
        for label, value in (
            ("Files", _number(totals["files"])),
            ("Lines", _number(totals["lines"])),
            ("Functions", _number(totals["functions"])),
            ("Classes", _number(totals["classes"])),
            ("Did not parse", _number(totals["unparsed"])),
            ("Time taken", _duration(figures.duration_s)),
        )
    )


def _lengths_section(function_counts: Mapping[int, int]) -> str:
    if not function_counts:
        return _section("Lengths of functions", "There is no function.", "")
    median, nine_tenths = _quantile(function_counts, 0.5), _quantile(function_counts, 0.9)
    return _section(
        f"Half of the functions have at most {_lines(median)}",
        "Lines per function, from its <code>def</code> to its end; each bar spans twice as many lengths as the one "
        f"before. Nine in ten functions have at most {_lines(nine_tenths)}.",
        _histogram(binned(function_counts)),
    )


def binned(function_counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(fewest lines, most lines, functions) for 1 line, 2, 3 to 4, 5 to 8 and so on, up to the longest; gaps too."""
    bins = []
    low, high = 1, 1
    while low <= max(function_counts):
        bins.append((low, high, sum(count for lines, count in function_counts.items() if low <= lines <= high)))
        low, high = high + 1, high * 2
    return bins


def _quantile(function_counts: Mapping[int, int], share: float) -> int:
    """The smallest length that at least `share` of the functions do not exceed."""
    wanted = share * sum(function_counts.values())
    seen = 0
    for lines in sorted(function_counts):
        seen += function_counts[lines]
        if seen >= wanted:
            return lines
    raise AssertionError("the shares of all lengths together are one")


def _histogram(bins: list[tuple[int, int, int]]) -> str:
    top, floor, gap = 34, 250, 10
    step = _WIDE / len(bins)
    functions = sum(count for _, _, count in bins)
    tallest = max(count for _, _, count in bins)
    parts = []
    for index, (low, high, count) in enumerate(bins):
        height = max((floor - top) * count / tallest, 1.5 * (count > 0))  # one function is still to be seen
        x, middle = index * step, (index + 0.5) * step
        span = str(low) if low == high else f"{low}–{high}"
        parts.append(
            f"<g><title>{span} lines: {_number(count)} functions, {_percent(count, functions)}</title>"
            f'<rect class="bar" x="{x + gap / 2:.1f}" y="{floor - height:.1f}" '
            f'width="{step - gap:.1f}" height="{height:.1f}" rx="3"/>'
            f'<text class="value" x="{middle:.1f}" y="{floor - height - 9:.1f}" text-anchor="middle">'
            f"{_number(count)}</text>"
            f'<text class="muted" x="{middle:.1f}" y="{floor + 20}" text-anchor="middle">{span}</text></g>'
        )
    parts.append(f'<line class="axis" x1="0" y1="{floor}" x2="{_WIDE}" y2="{floor}"/>')
    parts.append(f'<text class="muted" x="{_WIDE / 2:.0f}" y="{floor + 42}" text-anchor="middle">lines</text>')
    return _svg("wide", _WIDE, floor + 50, "Histogram of the lengths of functions", parts)


def _longest_section(longest: list[Function]) -> str:
    if not longest:
        return _section("Longest functions", "There is no function.", "")
    return _section(
        f"The longest function has {_lines(longest[0].lines)}",
        f"The {_number(len(longest))} longest, with how much they take and how deep their blocks go.",
        _longest_chart(longest),
    )


def _longest_chart(longest: list[Function]) -> str:
    row, bar_height = 50, 5
    parts = []
    for index, function in enumerate(longest):
        y = index * row
        width = _WIDTH * function.lines / longest[0].lines
        place = f"{function.path}:{function.line}"
        depth = f"{_plural(function.nesting, 'level')} deep" if function.nesting else "flat"
        shape = f"{_plural(function.arguments, 'argument')}, {depth}"
        parts.append(
            f"<g><title>{_text(function.name)}\n{_text(place)}\n{_lines(function.lines)}, {shape}</title>"
            f'<text class="code" x="0" y="{y + 14}">{_text(_end_of(function.name, 56))}</text>'
            f'<text class="value" x="{_WIDTH}" y="{y + 14}" text-anchor="end">{_number(function.lines)}</text>'
            f'<text class="muted" x="0" y="{y + 30}">{_text(_end_of(place, 50))}</text>'
            f'<text class="muted" x="{_WIDTH}" y="{y + 30}" text-anchor="end">{shape}</text>'
            f'<rect class="track" x="0" y="{y + 38}" width="{_WIDTH}" height="{bar_height}" rx="2.5"/>'
            f'<rect class="bar" x="0" y="{y + 38}" width="{width:.1f}" height="{bar_height}" rx="2.5"/></g>'
        )
    return _svg("", _WIDTH, row * len(longest), "Bars of the longest functions", parts)


def _packages_section(packages: list[Package]) -> str:
    if not packages:
        return _section("Docstrings", "There is no function and no class.", "")
    definitions = sum(package.definitions for package in packages)
    documented = sum(package.documented for package in packages)
    return _section(
        f"{_percent(documented, definitions)} of the definitions have a docstring",
        "Functions and classes by top-level package, best covered first. The dashed line is the whole: "
        f"{_number(documented)} of {_number(definitions)}.",
        _packages_chart(_coverage_rows(packages), documented / definitions),
    )


def _coverage_rows(packages: list[Package]) -> list[tuple[str, int, int]]:
    """(label, definitions, documented), best covered first; what is smallest shares the last row."""
    shown, rest = packages[:_PACKAGES_MAX], packages[_PACKAGES_MAX:]
    rows = [(package.name or "top-level modules", package.definitions, package.documented) for package in shown]
    rows.sort(key=lambda row: (-row[2] / row[1], row[0]))
    if rest:
        definitions = sum(package.definitions for package in rest)
        rows.append((f"{_number(len(rest))} smaller", definitions, sum(package.documented for package in rest)))
    return rows


def _packages_chart(rows: list[tuple[str, int, int]], overall: float) -> str:
    row, bar_height, bar_x, bar_end = 30, 12, 140, 340
    parts = []
    for index, (label, definitions, documented) in enumerate(rows):
        y = index * row
        width = (bar_end - bar_x) * documented / definitions
        parts.append(
            f"<g><title>{_text(label)}: {_number(documented)} of {_number(definitions)} have a docstring</title>"
            f'<text class="label" x="{bar_x - 12}" y="{y + 19}" text-anchor="end">{_text(_end_of(label, 19))}</text>'
            f'<rect class="track" x="{bar_x}" y="{y + 9}" width="{bar_end - bar_x}" height="{bar_height}" rx="3"/>'
            f'<rect class="bar" x="{bar_x}" y="{y + 9}" width="{width:.1f}" height="{bar_height}" rx="3"/>'
            f'<text class="value" x="{bar_end + 62}" y="{y + 19}" text-anchor="end">'
            f"{_percent(documented, definitions)}</text>"
            f'<text class="muted" x="{_WIDTH}" y="{y + 19}" text-anchor="end">'
            f"{_number(documented)} of {_number(definitions)}</text></g>"
        )
    x = bar_x + (bar_end - bar_x) * overall
    parts.append(f'<line class="mark" x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{row * len(rows)}"/>')
    return _svg("", _WIDTH, row * len(rows) + 2, "Bars of docstring coverage by package", parts)


def _unparsed_section(unparsed: list[Unparsed]) -> str:
    if not unparsed:
        return _section("Every file parses", "No file was left out of the counts above.", "")
    rows = "".join(
        f"<tr><td><code>{_text(file.path)}</code></td><td>{_text(file.problem)}</td></tr>" for file in unparsed
    )
    return _section(
        "1 file does not parse" if len(unparsed) == 1 else f"{_number(len(unparsed))} files do not parse",
        "They are among the files and lines that were counted; what they define is not.",
        f"<table><thead><tr><th>File</th><th>Why</th></tr></thead><tbody>{rows}</tbody></table>",
    )


def _section(title: str, caption: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{caption}</p>{content}</section>"


def _svg(style: str, width: int, height: int, label: str, parts: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></div>"
    )


def _text(text: str) -> str:
    """`text` for the page, in an element or a quoted attribute."""
    return html.escape(text, quote=True)


def _end_of(text: str, length_max: int) -> str:
    """`text`, or its last characters: the end of a path or a qualified name says most."""
    return text if len(text) <= length_max else "…" + text[1 - length_max :]


def _number(value: int) -> str:
    return f"{value:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _plural(count: int, noun: str) -> str:
    return f"{_number(count)} {noun}" if count == 1 else f"{_number(count)} {noun}s"


def _lines(count: int) -> str:
    return _plural(count, "line")


def _duration(duration_s: float) -> str:
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    return f"{int(duration_s // 60):,} min {int(duration_s % 60)} s"


_STYLE = """
:root { color-scheme: light dark;
  --ground: #f6f6f3; --surface: #ffffff; --ink: #1c1e22; --muted: #646870; --rule: #e3e3dd; --track: #ececE6;
  --bar: #2d6a9f; --mark: #c2571a; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #111316; --surface: #191c20; --ink: #e9eaec; --muted: #9aa0a9; --rule: #2a2e34; --track: #262a30;
  --bar: #6aa9dc; --mark: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { margin: 0 0 4px; font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; font-weight: 650; }
h2 { margin: 0; font-size: 19px; line-height: 1.3; letter-spacing: -0.01em; font-weight: 620; }
header p, section p { margin: 4px 0 0; color: var(--muted); }
header p { overflow-wrap: anywhere; }
code, .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.9em; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 28px 0 20px;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
.tile { background: var(--surface); padding: 16px 20px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 2px 0 0; font-size: 26px; line-height: 1.2; letter-spacing: -0.02em; font-weight: 600;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
section { background: var(--surface); border: 1px solid var(--rule); border-radius: 12px; padding: 24px 28px 28px;
  margin-bottom: 20px; min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 0 20px; }
.scroll { overflow-x: auto; margin-top: 20px; }
svg { display: block; width: 100%; min-width: 460px; height: auto; }
svg.wide { min-width: 760px; }
svg text { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .code { font-size: 12.5px; }
svg .value { font-weight: 600; }
svg .muted { font-size: 12px; fill: var(--muted); }
.bar { fill: var(--bar); }
g:hover .bar { fill: var(--ink); }
.track { fill: var(--track); }
.axis { stroke: var(--rule); stroke-width: 1; }
.mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 3 3; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 16px; }
th, td { text-align: left; vertical-align: baseline; padding: 8px 16px 8px 0; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
footer { color: var(--muted); font-size: 13px; padding: 4px; }
@media (max-width: 640px) {
  main { padding: 28px 12px 40px; }
  h1 { font-size: 28px; }
  section { padding: 20px 16px; }
  svg { min-width: 420px; }
  thead { display: none; }
  td { display: block; border: 0; padding: 0; overflow-wrap: anywhere; }
  td:first-child { padding-top: 12px; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Python {python}, counted</h1>
<p>Every Python source file below <code>{root}</code>, what others installed left out</p>
</header>
<dl>{tiles}</dl>
{lengths}
<div class="columns">
{longest}
{packages}
</div>
{unparsed}
<footer>The time is that from the first record stored to the last. The census comes with p2pcluster.</footer>
</main>
</body>
</html>
"""
