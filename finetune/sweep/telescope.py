"""Telescoping sweeps: grids that narrow while the model widens, each around the last optimum. No torch here.

Source: Essential AI 2025, Practical Efficiency of Muon for Pretraining (arXiv 2505.02222), algorithm 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError, named_here
from finetune.config.options import Training, option_fields, option_type
from finetune.sweep.reading import sweep_of
from finetune.sweep.spec import Sweep, command_words, import_script
from muon8bit import cli

SCRIPT = "pretrain"
FACTOR = 2.0  # between neighbours of the first grid
LEAST = 3  # values of an axis: fewer have no inside


@dataclass(frozen=True)
class Telescope:
    """A telescoping sweep.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        tuned: options that are tuned, the learning rate first.
        widths: of the grids, ascending.
        to: width of the run that the values are for.
        scaling: rule by which the script scales what it is given for the recipe's own width.
        rates: learning rates of the first grid; () for `points` of them around the recipe's.
        points: values of each other option in the first grid, around the recipe's.
        seeds: of every grid point.
        extend: values that may be added to each axis of a grid, beyond the end at which the optimum is.
    """

    recipe: str
    tuned: tuple[str, ...]
    widths: tuple[int, ...]
    to: int
    scaling: str
    rates: tuple[float, ...]
    points: int
    seeds: tuple[int, ...]
    extend: int

    @functools.cached_property
    def start(self) -> Training:
        """The recipe as it is."""
        return self.parse({})

    @property
    def recipe_hash(self) -> str:
        """Hash of the recipe as it is."""
        (arm,) = self._sweep({}, {"recipe": {"rates": [1e-3]}}).arms.values()
        return arm.recipe_hash

    def check(self) -> None:
        """Check the options, and that the recipe can have all widths.

        Raises:
            InputError: names the option.
        """
        recipe = self.start
        numbers = [f.name for f in option_fields(type(recipe)) if option_type(f) is float]
        for name in self.tuned:
            if name not in numbers:
                close = cli.nearest(name, numbers)
                meant = f"did you mean {close!r}?" if close else f"the options are {', '.join(numbers)}"
                raise InputError("--tune", f"{name!r} is no option of the recipe that is a number; {meant}")
            if not (vars(recipe)[name] or 0) > 0:
                raise InputError("--tune", f"{name} is {vars(recipe)[name]} in {self.recipe}; give it a value above 0")
        if "lr" not in self.tuned:
            raise InputError("--tune", "needs lr, and may have further options behind it")
        if len(set(self.tuned)) < len(self.tuned):
            raise InputError("--tune", f"{','.join(self.tuned)} has an option twice; leave one of them out")
        if any(narrow >= wide for narrow, wide in itertools.pairwise((*self.widths, self.to + 1))):
            given = ",".join(map(str, self.widths))
            raise InputError("--widths", f"{given} must ascend, and end at or below --to {self.to}")
        if self.points < LEAST or 0 < len(self.rates) < LEAST:
            option = "--points" if self.points < LEAST else "--rates"
            raise InputError(option, f"give {LEAST} values or more: of fewer none is between others")
        for width in (*self.widths, self.to):
            with named_here("--width", "--to" if width == self.to else "--widths"):
                self.parse(self.options(width))

    def parse(self, options: Mapping[str, Any]) -> Training:
        """Return the recipe with these options, as the script reads it."""
        words = command_words(self.recipe, options, 1e-3, self.seeds[0])
        kept = [word for word in words if not word.startswith("--lr=")]
        recipe: Training = import_script(SCRIPT).parse([*kept, "--output-dir=.telescope.run"])[0]
        return recipe

    def options(self, width: int) -> dict[str, Any]:
        """Return the options of all runs at a width."""
        return {"width": width, **({} if self.scaling == "none" else {"scaling": self.scaling})}

    def first_axes(self) -> tuple[tuple[float, ...], ...]:
        """Return the values of each tuned option in the first grid, ascending."""
        recipe = vars(self.start)
        axes = [_around(recipe[name], FACTOR, self.points) for name in self.tuned]
        return (tuple(sorted(self.rates)) or axes[0], *axes[1:])

    def points_at(self, number: int) -> tuple[int, ...]:
        """Return how many values each axis has in the grid of this number, from 0.

        A run costs as the square of the width. With k options each axis keeps growth ** (-2 / k) of its values, so that
        every grid costs about the same, rounded up to an odd number of at least `LEAST`.
        """
        points = [len(axis) for axis in self.first_axes()]
        for narrow, wide in itertools.pairwise(self.widths[: number + 1]):
            kept = [math.ceil(count * (wide / narrow) ** (-2 / len(points)) - 1e-9) for count in points]
            points = [max(LEAST, count + (count + 1) % 2) for count in kept]
        return tuple(points)

    def next_axes(
        self, number: int, axes: Sequence[Sequence[float]], at: Sequence[float]
    ) -> tuple[tuple[float, ...], ...]:
        """Return the grid of this number, around the optimum of the one before.

        The optimum moves by about 1 / width, so the spacing in log2 is divided by what the width grows by.

        Args:
            number: of the grid, from 1.
            axes: of the grid before.
            at: its optimum.
        """
        growth = self.widths[number] / self.widths[number - 1]
        return tuple(
            _around(center, (axis[-1] / axis[0]) ** (1 / (len(axis) - 1) / growth), points)
            for axis, center, points in zip(axes, at, self.points_at(number), strict=True)
        )

    @functools.cache  # noqa: B019 - a process has one telescoping sweep, which reads its grids again and again
    def sweep(self, width: int, axes: tuple[tuple[float, ...], ...]) -> Sweep:
        """Return the sweep of one grid: an arm for each combination of the options beside the learning rate."""
        arms = {}
        for values in itertools.product(*axes[1:]):
            chosen = dict(zip(self.tuned[1:], values, strict=True))
            name = "-".join([f"w{width}", *(f"{key}{value:g}" for key, value in chosen.items())])
            arms[name] = {**chosen, "rates": list(axes[0])}
        return self._sweep(self.options(width), arms)

    def costs(self) -> Sweep:
        """Return a sweep with an arm for each width, that of the final run included: a run of it costs as any."""
        recipe = vars(self.start)
        widths = dict.fromkeys((*self.widths, self.to))
        arms = {f"w{width}": {**self.options(width), "rates": [recipe["lr"]]} for width in widths}
        return self._sweep({}, arms)

    def _sweep(self, common: Mapping[str, Any], arms: Mapping[str, Any]) -> Sweep:
        file = Path(self.recipe).expanduser()
        recipe = str(file.resolve()) if file.is_file() else self.recipe
        values = {"recipe": recipe, "script": SCRIPT, "common": dict(common), "seeds": list(self.seeds), "arms": arms}
        return sweep_of(values, Path(file.stem))


def _around(center: float, ratio: float, points: int) -> tuple[float, ...]:
    """Return a geometric grid, to 4 digits, so that all machines make the same one of the same losses."""
    return tuple(float(f"{center * ratio ** (i - (points - 1) / 2):.4g}") for i in range(points))
