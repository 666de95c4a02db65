"""Changes of activations by width: their ratios, what they say, and their picture. No torch in here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.storage.plots import new_figure, save_figure

# Largest ratios of the changes at the ends of the widths with which a model scales, of the median activation and of the
# worst one; and the least change over the initial RMS with which that can be said.
MEDIAN, WORST, LEAST = 1.2, 1.6, 0.3
_STYLES = {"attention": "-", "mlp": "--", "stream": "-.", "final norm": ":", "logits": ":"}


@dataclass(frozen=True)
class CoordinateVerdict:
    """Result of a coordinate check.

    Args:
        ratios: activation -> its change at the widest over that at the narrowest, means over seeds.
        median, worst: of these or their inverses, whichever is above 1.
        least: the smallest change over the initial RMS, of all activations and widths, and whose.
        text: "scales", "does not scale" or "too short to say".
    """

    ratios: Mapping[str, float]
    median: float
    worst: float
    least: tuple[float, str]
    text: str


def means(measured: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Return activation -> width -> mean over seeds of `key`, "change" or "initial"."""
    found: dict[str, dict[int, list[float]]] = {}
    for one in measured:
        for name, values in one["activations"].items():
            found.setdefault(name, {}).setdefault(one["width"], []).append(values[key])
    return {n: {w: statistics.fmean(v) for w, v in sorted(by_width.items())} for n, by_width in found.items()}


def judge(measured: Sequence[Mapping[str, Any]]) -> CoordinateVerdict:
    """Return what measurements of at least two widths say.

    Args:
        measured: of one width and seed each: `width`, `seed`, and `activations`: name -> RMS of "change" and "initial".
    """
    changes, initial = means(measured, "change"), means(measured, "initial")
    ratios = {name: by_width[max(by_width)] / by_width[min(by_width)] for name, by_width in changes.items()}
    away = [max(ratio, 1 / ratio) for ratio in ratios.values()]
    median, worst = statistics.median(away), max(away)
    least = min(
        (change / initial[name][width], f"{name} at width {width}")
        for name, by_width in changes.items()
        for width, change in by_width.items()
    )
    text = "scales" if median <= MEDIAN and worst <= WORST else "does not scale"
    return CoordinateVerdict(ratios, median, worst, least, text if least[0] >= LEAST else "too short to say")


def table(measured: Sequence[Mapping[str, Any]], verdict: CoordinateVerdict) -> str:
    """Return a table of changes by width, with the ratios, and the verdict."""
    changes = means(measured, "change")
    widths = sorted({one["width"] for one in measured})
    lines = [f"{'RMS of the change':24}" + "".join(f"{width:>10}" for width in widths) + f"{'ratio':>10}"]
    for name, by_width in changes.items():
        numbers = [*(by_width[width] for width in widths), verdict.ratios[name]]
        lines.append(f"{name:24}" + "".join(f"{number:>10.4g}" for number in numbers))
    lines.append(
        f"{verdict.text}: ratios of the widest to the narrowest change are {verdict.median:.3g} from 1 in the median "
        f"(at most {MEDIAN}) and {verdict.worst:.3g} at worst (at most {WORST}); the least change is "
        f"{verdict.least[0]:.2g} of the initial RMS (at least {LEAST}), {verdict.least[1]}"
    )
    return "\n".join(lines)


def plot_changes(measured: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the changes of all activations over the width, means over seeds, on logarithmic axes.

    Args:
        measured: as for `judge`.
        path: the .png to write; a reader sees the old picture or the new one.
        title: of the figure.

    Raises:
        OSError: the file cannot be written.
    """
    figure = new_figure(7)
    axes = figure.add_axes((0.1, 0.11, 0.62, 0.81))
    for number, (name, by_width) in enumerate(means(measured, "change").items()):
        style = next((style for kind, style in _STYLES.items() if kind in name), "-")
        axes.plot(list(by_width), list(by_width.values()), f"o{style}", color=f"C{number % 10}", ms=3, label=name)
    widths = sorted({one["width"] for one in measured})
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="RMS of the change since initialization", title=title)
    axes.set_xticks(widths, list(map(str, widths)))
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, path)
