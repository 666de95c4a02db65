"""Route every model class of the installed transformers, and hold each route against a second rule.

    python -m benchmarks.robustness.routing_screen            # continues where it was stopped
    python -m benchmarks.robustness.routing_screen --again    # from the start
    python -m benchmarks.robustness.routing_screen --only Llama Gemma3   # printed, nothing written

Models are built on the meta device at their default widths, of 8 layers, in a process beside this one: nothing is
downloaded, no remote code runs, and a class that crashes, or takes too long or too much memory, ends only itself.
`results/` gets one line a class (`routing_screen.csv`) as it comes, and the table made of them (`routing_screen.md`).
The exit status is 1 where the second rule finds a fault.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from benchmarks.robustness.screen_record import BUILT, NO_MATRIX, Row, read, table

SOURCES = ("model_classes.py", "second_rule.py", "routing_screen.py", "screen_record.py")
RESULTS = Path(__file__).parents[1] / "results"
NUM_LAYERS = 8  # as many as the longest pattern of layers that differ
SECONDS = 120  # for one class
CLASSES_A_PROCESS = 150
MEMORY = 12 * 2**30  # bytes of data of a process


def screen_one(module_name: str, name: str, num_layers: int | None = None) -> Row:
    """Build one class, of so many layers, and look at its groups."""
    import muon8bit
    from benchmarks.robustness import model_classes, second_rule

    try:
        cls = next(cls for cls in model_classes.classes_of(module_name) if cls.__name__ == name)
        model = model_classes.build(cls, num_layers)
    except Exception as error:  # of the class's own code, whatever it is
        return Row(module_name, name, reason_of(error))
    model.requires_grad_(True)
    placed = {param: second_rule.Placed("adamw", False) for param, _ in model.named_parameters()}
    try:
        groups = muon8bit.param_groups(model, lr=1e-3, weight_decay=0.1)
    except ValueError as error:
        if "no matrix for Muon" not in str(error):
            raise
        lost = second_rule.lost(model, placed)
        return Row(module_name, name, NO_MATRIX, adamw=len(placed), lost=len(lost))
    flagged = {route.name for route in groups.routes if route.flag}
    for group in groups:
        for param, _ in group["params"]:
            decays, num_pieces = group["weight_decay"] != 0, len(group.get("split_sizes") or (0,))
            placed[param] = second_rule.Placed(group["algorithm"], decays, param in flagged, num_pieces)
    num_muon = sum(place.algorithm == "muon" for place in placed.values())
    faults = [f"{kind}: {param} {list(shape)}" for kind, param, shape in second_rule.faults(model, placed)]
    return Row(
        module_name,
        name,
        BUILT if num_muon else NO_MATRIX,
        muon=num_muon,
        adamw=len(placed) - num_muon,
        flagged=len(flagged),
        lost=len(second_rule.lost(model, placed)),
        faults="; ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", fault) for fault in faults)),
    )


def reason_of(error: BaseException) -> str:
    """Return why a class cannot be built, in a few words that are the same for all classes of that reason."""
    text = " ".join(str(error).split())
    if missing := re.search(r"No module named '(\w+)|requires the (\w+) library|install (\w+)", text):
        return f"needs {next(filter(None, missing.groups())).lower()}"
    return f"{type(error).__name__}: {text[:120]}"


def all_classes() -> Iterator[tuple[str, str] | Row]:
    """Yield module and name of every class, or a row for a module that cannot be imported."""
    from benchmarks.robustness import model_classes

    for module_name in model_classes.modeling_modules():
        try:
            yield from ((module_name, cls.__name__) for cls in model_classes.classes_of(module_name))
        except Exception as error:
            yield Row(module_name, "*", reason_of(error))


def run_child(classes: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Yield the rows of some classes, made in a process of their own.

    It ends at the first class that it does not survive, whose row says so.
    """
    command = [sys.executable, "-m", "benchmarks.robustness.routing_screen", "--child"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(classes))
        child.stdin.close()
        for module_name, name in classes:
            timer = threading.Timer(SECONDS, child.kill)
            timer.start()
            line = child.stdout.readline()
            is_late = not timer.is_alive()
            timer.cancel()
            if not line:
                code = child.wait()
                why = f"takes more than {SECONDS} s" if is_late else f"ends its process with status {code}"
                yield Row(module_name, name, why)
                return
            yield Row(**json.loads(line))


def be_child() -> None:
    """Screen the classes that stand on the input, a line of output for each."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    classes = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(1)
    for module_name, name in classes:
        print(json.dumps(asdict(screen_one(module_name, name, NUM_LAYERS))), file=out, flush=True)


def screen(classes: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Yield the rows of all classes, in their order."""
    todo = list(classes)
    while todo:
        for row in run_child(todo[:CLASSES_A_PROCESS]):
            yield row
            todo.pop(0)


def about() -> str:
    """Return what the rows depend on: releases, and the source of the rules."""
    root = Path(__file__).parents[2]
    files = [*sorted((root / "muon8bit").rglob("*.py")), *(Path(__file__).with_name(n) for n in SOURCES)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return f"# transformers {version('transformers')}, torch {version('torch').split('+')[0]}, sources {digest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Screen what the record lacks; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", type=Path, default=RESULTS / "routing_screen.csv")
    parser.add_argument("--again", action="store_true", help="forget an earlier record")
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="classes whose names begin so; prints them only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        be_child()
        return 0
    wanted = list(all_classes())
    classes = [entry for entry in wanted if not isinstance(entry, Row)]
    if options.only:
        chosen = [entry for entry in classes if entry[1].startswith(tuple(options.only))]
        rows = []
        for row in screen(chosen):
            print(*asdict(row).values(), sep=" | ", flush=True)
            rows.append(row)
        return int(any(row.faults for row in rows))
    first, rows = ("", []) if options.again else read(options.record)
    if rows and first != about():
        print(f"{options.record} is of {first[2:]}, this is {about()[2:]}: give --again or another --record")
        return 2
    done = {(row.module, row.name) for row in rows}
    with options.record.open("a" if rows else "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if not rows:
            file.write(about() + "\n")
            writer.writeheader()
        unreadable = [entry for entry in wanted if isinstance(entry, Row) and (entry.module, entry.name) not in done]
        for new in (unreadable, screen([entry for entry in classes if entry not in done])):
            for row in new:
                rows.append(row)
                writer.writerow(asdict(row))
                file.flush()
                print(f"{len(rows)}/{len(wanted)} {row.name}: {row.outcome} {row.faults}", flush=True)
    rows.sort(key=lambda row: (row.module, row.name))
    options.record.with_suffix(".md").write_text(table(about(), rows))
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
