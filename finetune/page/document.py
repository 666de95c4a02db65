"""The HTML of a page: tables of runs and options around the figures. No torch in here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import muon8bit
from finetune.compare import COLUMNS
from finetune.page.figures import DrawnFigure
from finetune.page.runs import OF_A_RUN, Line, PageRun

# Nothing may be fetched, and no script runs, whatever a run is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 84rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #bbb; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; }
p { margin: .3rem 0; max-width: 60rem; }
p, figcaption, caption { color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 1.5px solid #1a1a1a; }
tbody tr { border-bottom: 1px solid #ddd; }
tbody th { font-weight: 600; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.6rem 2.2rem;
  align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; }
.shared { columns: 18rem; column-gap: 2.5rem; font-size: .85rem; margin: 0; }
.shared div { break-inside: avoid; display: flex; justify-content: space-between; gap: 1rem;
  border-bottom: 1px solid #eee; }
.shared dt { color: #444; }
.shared dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
@media print {
  @page { margin: 14mm; }
  body { font-size: 9pt; max-width: none; margin: 0; padding: 0; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .5rem; }
  tr { break-inside: avoid; }
  figcaption { font-size: 7.5pt; }
  .figures { display: block; }
  figure { display: inline-block; width: 48%; vertical-align: top; margin: 0 1.5% 5mm 0; }
}
"""


def make_page(title: str, lines: Sequence[Line], figures: Sequence[DrawnFigure]) -> str:
    """Return the page, the same text for the same runs.

    Args:
        title: its heading.
        lines: of its tables.
        figures: in the order in which they stand.
    """
    num_runs = sum(len(line.runs) for line in lines)
    count = f"{num_runs} run{'s' if num_runs > 1 else ''}"
    left_out = [line for line in lines if not line.is_drawn]
    lead = f"{count} of training. Written by <code>finetune.page</code> of muon8bit {escape(muon8bit.__version__)}."
    if left_out:
        lead += " Of each arm the figures over steps show the rate with most seeds, then the lowest validation loss."
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{lead}</p>",
            "<h2>Results</h2>",
            _results(lines),
            "<h2>Figures</h2>",
            '<div class="figures">',
            *map(_figure, figures),
            "</div>",
            *_options(lines),
            *_versions(lines),
            "</body>",
            "</html>",
            "",
        ]
    )


def _figure(figure: DrawnFigure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure>\n<h3>{escape(figure.title)}</h3>\n{figure.svg}\n{caption}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int, caption: str = "") -> str:
    """Return a table; the first cell of a row is its heading, and cells from `numbers` on are flush right."""

    def cell(start: str, end: str, text: str, i: int) -> str:
        kind = ' class="number"' if i >= numbers else ""
        return f"<{start}{kind}>{escape(text)}</{end}>"

    header = "".join(cell('th scope="col"', "th", text, i) for i, text in enumerate(head))
    body = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(cell("td", "td", text, i) for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    ]
    text = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{text}\n<thead><tr>{header}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _results(lines: Sequence[Line]) -> str:
    head = ["run", "optimizer", "seed", "steps", "training loss", "validation loss", "tokens/s", "step (ms)"]
    head += ["state", "peak", "status"]
    caption = "Losses in nats, after the last step. Mean ± standard deviation where a line has several seeds."
    return _table(head, [_result(line) for line in lines], 2, caption if any(len(li.runs) > 1 for li in lines) else "")


def _result(line: Line) -> list[str]:
    def shown(key: str) -> str:
        return _mean([run.values.get(key) for run in line.runs], COLUMNS[key])

    optimizers = dict.fromkeys(str(run.values["optimizer"] or "-") for run in line.runs)
    times = [statistics.median(run.step_ms) if run.step_ms else None for run in line.runs]
    states = [run.status for run in line.runs]
    status = ", ".join(f"{states.count(s)} {s}" if len(set(states)) > 1 else s for s in dict.fromkeys(states))
    middle = [shown(key) for key in ("step", "loss", "val_loss", "tokens_per_second")]
    sizes = [shown("state_bytes"), shown("peak_bytes")]
    return [
        line.name,
        ", ".join(optimizers),
        _seeds(line.runs),
        *middle,
        _mean(times, "{:,.1f}".format),
        *sizes,
        status,
    ]


def _seeds(runs: Sequence[PageRun]) -> str:
    seeds = [run.seed for run in runs if run.seed is not None]
    return "-" if not seeds else str(seeds[0]) if len(seeds) == 1 else f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"


def _mean(values: Sequence[float | None], show: Callable[[Any], str]) -> str:
    """Return mean and standard deviation of the values that are known, "-" where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if not all(map(math.isfinite, known)):
        return "not finite"
    if len(set(known)) == 1:
        return show(known[0])
    mean = statistics.fmean(known)
    return f"{show(round(mean) if isinstance(known[0], int) else mean)} ± {show(statistics.stdev(known))}"


def _options(lines: Sequence[Line]) -> list[str]:
    differ, shared = _split([(line.name, line.runs[0].options) for line in lines], leave_out=OF_A_RUN)
    parts = []
    if differ:
        parts += ["<h2>Options that differ</h2>", _by_line(lines, differ)]
    if shared:
        heading = "Options" if len(lines) == 1 else "Options that all have"
        parts += [f"<h2>{heading}</h2>", _definitions(shared)]
    return parts


def _versions(lines: Sequence[Line]) -> list[str]:
    merged = []
    for line in lines:
        found: dict[str, list[str]] = {}
        for run in line.runs:
            for key, value in run.versions.items():
                found.setdefault(key, []).append(str(value))
        merged.append((line.name, {key: ", ".join(dict.fromkeys(values)) for key, values in found.items()}))
    differ, shared = _split(merged)
    if not (differ or shared):
        return []
    parts = ["<h2>Software, machine and data</h2>"]
    return parts + ([_by_line(lines, differ)] if differ else []) + ([_definitions(shared)] if shared else [])


def _split(
    named: Sequence[tuple[str, Mapping[str, Any]]], leave_out: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return key -> the value of each line where they differ, and key -> the value that all have."""
    keys = [key for key in dict.fromkeys(key for _, values in named for key in values) if key not in leave_out]
    columns = {key: [_shown(values[key]) if key in values else "-" for _, values in named] for key in keys}
    differ = {key: column for key, column in columns.items() if len(set(column)) > 1}
    return differ, {key: column[0] for key, column in columns.items() if key not in differ}


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _by_line(lines: Sequence[Line], columns: Mapping[str, Sequence[str]]) -> str:
    rows = [[line.name, *(column[i] for column in columns.values())] for i, line in enumerate(lines)]
    return _table(["run", *columns], rows, len(columns) + 1)


def _definitions(values: Mapping[str, str]) -> str:
    entries = (f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items())
    return '<dl class="shared">\n' + "\n".join(entries) + "\n</dl>"
