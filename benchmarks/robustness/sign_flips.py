"""Measure what 8-bit momentum costs AdaMuon, whose Newton-Schulz input is sign(u): flips, and the error of the update.

    python -m benchmarks.robustness.sign_flips                 # trains the models that are not recorded yet
    python -m benchmarks.robustness.sign_flips --table

Models of `sign_models` are trained in fp32 by AdaMuon (arXiv 2507.11005, algorithm 1), embedding, head, routers and
norms by AdamW. The formats of `sign_formats` are fed the same gradients from the first step: m is read as stored, the
gradient added, u is that m, exactly (of Nesterov, beta * m + (1 - beta) * g), then m is stored again. They are compared
with fp32 at the end of the warm-up, in the middle and at the end. V of each begins as fp32's, WINDOW steps earlier.

Columns of the record, in this order; errors are Frobenius norms of the difference over that of fp32's:
"flips", "flips_nesterov": share of elements where both signs are not 0 and differ. "lost": sign 0 here only. "ns",
"ns_nesterov": error of Newton-Schulz of the signs. "muon": the same without the signs. "update": error of the update
with V in fp32; "update_v8": with sqrt(V) in 8 linear bits and the momentum's block size. Formats `V ...` have fp32
momentum and V in 8 bits from the first step. `step before`: fp32's own u and update, one step earlier.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.robustness.sign_formats import FORMATS, SHIPPED, SimulatedFormat, kept, kept_square
from benchmarks.robustness.sign_models import CONFIGS, TrainedMatrix, batches, build, matrices

RECORD = Path(__file__).parents[1] / "results" / "sign_flips.jsonl"
COLUMNS = ("flips", "flips_nesterov", "lost", "ns", "ns_nesterov", "muon", "update", "update_v8")
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
BETA, WINDOW = 0.95, 12
RATES = dict.fromkeys(CONFIGS, 5e-3) | {"rows4096": 1.25e-3, "smollm2": 5e-4}  # wide; pretrained
WARM_UPS = dict.fromkeys(CONFIGS, 40) | {"smollm2": 12}
CODEBOOKS = {form.codebook for form in FORMATS}
V_FORMATS = {f"V {codebook} {block}": (block, codebook) for codebook in ("root", "plain") for block in (256, 2048)}
Values = dict[str, dict[str, float]]


def newton_schulz(u: Tensor) -> Tensor:
    """Return five Jordan steps of u [..., rows, cols] over its Frobenius norm, in fp32."""
    X = u.mT if u.shape[-2] > u.shape[-1] else u
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in JORDAN:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if u.shape[-2] > u.shape[-1] else X


def next_second_moment(V: Tensor, output: Tensor) -> Tensor:
    """Return the second moment after an output of Newton-Schulz, both [..., rows, cols]."""
    return BETA * V + (1 - BETA) * output * output


def adamuon_update(V: Tensor, output: Tensor) -> Tensor:
    """Return AdaMuon's update for lr 1, of RMS 0.2, from the output of Newton-Schulz and the V that has it in."""
    update = output / (V.sqrt() + 1e-8)
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    return 0.2 * math.sqrt(output.shape[-2] * output.shape[-1]) * update / norm


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected, averaged over matrices."""
    difference, norm = (torch.linalg.vector_norm(t, dim=(-2, -1)) for t in (found - expected, expected))
    return float((difference / norm.clamp(min=1e-30)).mean())


def signs(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the shares of signs that are the other one, and of those that are 0 instead."""
    product = found.sign() * expected.sign()
    lost = ((found == 0) & (expected != 0)).float().mean()
    return {"flips": float((product < 0).float().mean()), "lost": float(lost)}


class Watched:
    """State of one parameter in fp32, and as far as it is watched, in every format.

    Attributes:
        m, V: fp32 [count, rows, cols], of the last step; so are u and update.
    """

    def __init__(self, matrix: TrainedMatrix) -> None:
        self.matrix = matrix
        self.m, self.V = torch.zeros(matrix.shape), torch.zeros(matrix.shape)
        self.u, self.update = self.m, self.m
        forms = dict.fromkeys(form.in_rows_of(matrix.shape[2]) for form in FORMATS)  # long blocks are one in short rows
        self.formats = list(forms) if matrix.kind else []
        self.shipped = {form.in_rows_of(matrix.shape[2]) for form in SHIPPED}
        self.stored = dict.fromkeys(self.formats, self.m)
        self.V8 = dict.fromkeys(V_FORMATS, self.V) if matrix.kind else {}
        self.window: dict[SimulatedFormat, tuple[Tensor, Tensor]] = {}

    def step(self, begins_window: bool, measures: bool) -> Values:
        """Take the gradient of the parameter; returns values by format where it measures, else nothing."""
        g = self.matrix.view(self.matrix.param.grad) * (1 - BETA)
        u_before, update_before = self.u, self.update
        self.m = self.u = BETA * self.m + g
        output = newton_schulz(self.u.sign())
        if begins_window:
            forms = [form for form in self.formats if form in self.shipped]
            self.window = {form: (self.V, kept_square(self.V, form.block_size)) for form in forms}
        self.V = next_second_moment(self.V, output)
        self.update = adamuon_update(self.V, output)
        values: Values = {}
        if measures and self.formats:
            values["step before"] = {**signs(u_before, self.u), "update": error(update_before, self.update)}
        for name, V8 in self.V8.items():
            V8 = next_second_moment(V8, output)
            if measures:
                values[name] = {"update": error(adamuon_update(V8, output), self.update)}
            self.V8[name] = kept_square(V8, *V_FORMATS[name])
        outputs = (output, newton_schulz((BETA * self.m + g).sign()), newton_schulz(self.u)) if measures else ()
        for form in self.formats:
            m = BETA * self.stored[form] + g
            self.stored[form] = kept(m, form)
            found = self._second_moments(form, m) if form in self.window else {}
            if outputs:
                values[form.name] = self._measured(m, g, outputs) | found
        if measures:
            self.window = {}
        return values

    def _second_moments(self, form: SimulatedFormat, u: Tensor) -> dict[str, float]:
        output = newton_schulz(u.sign())
        V, V8 = (next_second_moment(V, output) for V in self.window[form])
        self.window[form] = V, kept_square(V8, form.block_size)
        updates = {"update": adamuon_update(V, output), "update_v8": adamuon_update(V8, output)}
        return {name: error(update, self.update) for name, update in updates.items()}

    def _measured(self, u: Tensor, g: Tensor, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        u_nesterov = BETA * u + g
        return {
            **signs(u, self.u),
            "flips_nesterov": signs(u_nesterov, BETA * self.m + g)["flips"],
            "ns": error(newton_schulz(u.sign()), outputs[0]),
            "ns_nesterov": error(newton_schulz(u_nesterov.sign()), outputs[1]),
            "muon": error(newton_schulz(u), outputs[2]),
        }


def train(name: str, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Train a model; gives the records at the three measured steps."""
    torch.manual_seed(seed)
    model = build(name)
    states = [Watched(matrix) for matrix in matrices(name, model)]
    hidden = {id(state.matrix.param) for state in states if state.matrix.is_hidden}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in hidden]
    adamw = torch.optim.AdamW(others, lr=RATES[name] / 2, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = WARM_UPS[name]
    phases = {warm_up: "warm-up", num_steps // 2: "middle", num_steps: "end"}
    ids, start = batches(name, seed), time.perf_counter()
    for step in range(1, num_steps + 1):
        lr = RATES[name] * min(step / warm_up, 1 - 0.9 * max(step - warm_up, 0) / (num_steps - warm_up))
        batch = next(ids)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for state in states:
                values = state.step(step + WINDOW - 1 in phases, step in phases)
                matrix = state.matrix
                if matrix.is_hidden:
                    matrix.view(matrix.param).mul_(1 - 0.1 * lr).sub_(lr * state.update)
                if values:
                    where = {"model": name, "step": step, "phase": phases[step], "kind": matrix.kind}
                    shape = {"rows": matrix.shape[1], "cols": matrix.shape[2]}
                    yield {**where, **shape, "values": {form: cells(found) for form, found in values.items()}}
        adamw.param_groups[0]["lr"] = lr / 2
        adamw.step()
        model.zero_grad()
        if step % 20 == 0 or step in phases:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def cells(found: dict[str, float]) -> list[float | None]:
    """Return the values in the order of COLUMNS, with three digits; None for what was not measured."""
    return [None if column not in found else float(f"{found[column]:.3g}") for column in COLUMNS]


def column_of(records: list[dict[str, Any]], name: str, column: str, **where: Any) -> list[float]:
    """Return a format's values of a column, of the records that have it; `where`: values of other keys."""
    codebook, _, block = name.rpartition(" ")
    found = []
    for record in records:
        if all(record[key] == value for key, value in where.items()):
            is_blocks = codebook in CODEBOOKS and block.isdecimal()
            form = SimulatedFormat(codebook, int(block)).in_rows_of(record["cols"]).name if is_blocks else name
            found.append(record["values"].get(form, [None] * len(COLUMNS))[COLUMNS.index(column)])
    return [value for value in found if value is not None]


def table(records: list[dict[str, Any]]) -> str:
    """Return tables in Markdown: all columns by format; flips and update errors by kind of matrix and by phase."""
    names = ["step before", *V_FORMATS, *(form.name for form in FORMATS)]

    def line(name: str, values: list[list[float]]) -> str:
        return f"| {name} | " + " | ".join(f"{mean(v):.2%}" if v else "" for v in values) + " |"

    lines = ["| format | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [line(name, [column_of(records, name, column) for column in COLUMNS]) for name in names]
    wheres = [{key: value} for key in ("kind", "phase", "model") for value in dict.fromkeys(r[key] for r in records)]
    for column in ("flips", "ns", "update"):
        lines += ["", f"| {column} | " + " | ".join(str(v) for where in wheres for v in where.values()) + " | most |"]
        lines.append("| --- " * (len(wheres) + 2) + "|")
        for name in names:
            values = [column_of(records, name, column, **where) for where in wheres]
            most = max(column_of(records, name, column), default=None)
            lines.append(line(name, [*values, [] if most is None else [most]]))
    return "\n".join(lines)


def main() -> None:
    """Train and measure what is not recorded, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, action="append", help="only these; default: all, in turn")
    parser.add_argument("--steps", type=int, default=160, help="of training; at least twice the warm-up and WINDOW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text")
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON lines: one for each matrix and step")
    parser.add_argument("--table", action="store_true", help="print the tables of what is recorded, and train nothing")
    options = parser.parse_args()
    file: Path = options.record
    for name in () if options.table else options.model or CONFIGS:
        text = file.read_text() if file.exists() else ""
        if f'"model": "{name}"' not in text:
            records = list(train(name, options.steps, options.seed))
            file.write_text(text + "".join(json.dumps(record) + "\n" for record in records))
    print(table([json.loads(line) for line in file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
