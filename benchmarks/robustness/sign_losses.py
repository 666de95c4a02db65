"""Train one small Llama by AdaMuon with its state in each format, and compare validation losses over seeds.

    python -m benchmarks.robustness.sign_losses                # runs what is not recorded yet
    python -m benchmarks.robustness.sign_losses --table

What `sign_flips` measures beside a run in fp32 is here in the loop: each step reads momentum and V as they were stored.
V is stored as the 8-bit root with the momentum's block size; in fp32 with the formats fp32 and bf16. Same initial
weights and batches for each format of a seed. The gap of a format is its loss minus that of fp32, seed by seed.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.robustness.sign_flips import BETA, WARM_UPS, adamuon_update, newton_schulz, next_second_moment
from benchmarks.robustness.sign_formats import SimulatedFormat, kept, kept_square
from benchmarks.robustness.sign_models import CONFIGS, batches, matrices

RECORD = Path(__file__).parents[1] / "results" / "sign_losses.json"
MODEL = {**CONFIGS["llama"], "num_hidden_layers": 1, "intermediate_size": 1024}
FORMS = {
    form.name: form
    for form in (
        SimulatedFormat("fp32", 0),
        SimulatedFormat("bf16", 0),
        SimulatedFormat("linear", 2048),
        SimulatedFormat("dynamic", 2048),
        SimulatedFormat("square", 2048),
    )
}
SEEDS = (0, 1, 2)
NUM_STEPS, RATE, NUM_VALIDATION = 150, 5e-3, 16


def run(form: SimulatedFormat, seed: int) -> dict[str, Any]:
    """Train once; return the record, with the validation loss in nats per token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.float32)
    hidden = [matrix for matrix in matrices("llama", model) if matrix.is_hidden]
    others = {id(p): p for p in model.parameters()}
    for matrix in hidden:
        del others[id(matrix.param)]
    adamw = torch.optim.AdamW(others.values(), lr=RATE / 2, betas=(0.9, 0.95), weight_decay=0.0)
    zeros = [torch.zeros(matrix.shape) for matrix in hidden]
    momenta, second_moments = list(zeros), list(zeros)
    ids, warm_up = batches("llama", seed), WARM_UPS["llama"]
    for step in range(1, NUM_STEPS + 1):
        lr = RATE * min(step / warm_up, 1 - 0.9 * max(step - warm_up, 0) / (NUM_STEPS - warm_up))
        batch = next(ids)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for i, matrix in enumerate(hidden):
                assert matrix.param.grad is not None
                m = BETA * momenta[i] + (1 - BETA) * matrix.view(matrix.param.grad)
                output = newton_schulz(m.sign())
                V = next_second_moment(second_moments[i], output)
                matrix.view(matrix.param).mul_(1 - 0.1 * lr).sub_(lr * adamuon_update(V, output))
                momenta[i], second_moments[i] = stored(m, V, form)
        adamw.param_groups[0]["lr"] = lr / 2
        adamw.step()
        model.zero_grad()
    return {"form": form.name, "seed": seed, "steps": NUM_STEPS, "val_loss": round(validation_loss(model), 5)}


def stored(m: Tensor, V: Tensor, form: SimulatedFormat) -> tuple[Tensor, Tensor]:
    """Return momentum and V as the next step reads them."""
    if form.codebook == "fp32":
        return m, V
    return kept(m, form), kept_square(V, form.block_size) if form.block_size else V


@torch.no_grad()
def validation_loss(model: Any) -> float:
    """Return the mean loss over held-out text, the same for every run."""
    ids = batches("llama", 0, part="validation")
    return mean(float(model(input_ids=batch, labels=batch).loss) for batch in islice(ids, NUM_VALIDATION))


def table(records: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: losses by seed, and the mean gap to fp32 with its standard error."""
    losses = {(record["form"], record["seed"]): record["val_loss"] for record in records}
    lines = ["| state | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean gap |", "| --- " * 5 + "|"]
    for form in FORMS:
        found = [losses.get((form, seed)) for seed in SEEDS]
        gaps = [losses[form, seed] - losses["fp32", seed] for seed in SEEDS if (form, seed) in losses]
        gap = f"{mean(gaps):+.4f} +- {stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 and form != "fp32" else ""
        lines.append(f"| {form} | " + " | ".join("" if x is None else f"{x:.3f}" for x in found) + f" | {gap} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON file with a record of each run")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded, and run nothing")
    options = parser.parse_args()
    file: Path = options.record
    records = json.loads(file.read_text()) if file.exists() else []
    for seed in () if options.table else SEEDS:
        for name, form in FORMS.items():
            if not any((record["form"], record["seed"]) == (name, seed) for record in records):
                records.append(run(form, seed))
                file.write_text(json.dumps(records, indent=1) + "\n")
                print(records[-1], flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
