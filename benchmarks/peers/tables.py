"""Tables of what the checks found, in Markdown, out of the records and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
LONGEST = 110  # characters of a cell; the record has errors in full


def write_tables(records: Sequence[Record], not_run: Mapping[str, str]) -> str:
    """Return the page: one table of steps and sizes, one of checkpoints, one of routing, and what was not run."""
    reasons = {id(record): record["reason"] or _only_error(record) for record in records}
    done = [record for record in records if not reasons[id(record)]]
    tables = [
        ("Step", {"closest rule": _rule, "cosine": _rule_cosine, "g, 1000 g": _scale, "one NaN": _nan}),
        ("Size and time", {"bytes a parameter": _bytes, "step over torch's": _time}),
        (
            "Checkpoints and ranks",
            {
                "resume, fp32": lambda r: _resume(r, "resume fp32"),
                "resume, bf16": lambda r: _resume(r, "resume bf16"),
                "by parameter names": lambda r: _resume(r, "resume by names"),
                "distributed checkpoint": lambda r: _resume(r, "resume dcp"),
                "two ranks": _sharding,
                "2 to 1 rank": _resharding,
            },
        ),
        ("Routing", {kind: _kind(kind) for kind in ("hidden", "embed_tokens", "lm_head", "conv", "experts", "norm")}),
    ]
    parts = ["# Optimizer classes under the same checks", ""]
    for title, columns in tables:
        parts += [f"## {title}", "", _row(["class", *columns]), _row(["---"] * (len(columns) + 1))]
        parts += [_row([_name(record), *(column(record) for column in columns.values())]) for record in done]
        parts.append("")
    left_out = {_name(record): reasons[id(record)] for record in records if reasons[id(record)]} | dict(not_run)
    if left_out:
        parts += ["## Not run", "", _row(["class", "reason"]), _row(["---"] * 2)]
        parts += [_row([name, reason]) for name, reason in left_out.items()] + [""]
    return "\n".join(parts)


def _only_error(record: Record) -> str:
    """Return the error in which the first step of every check ends, "" where one does not."""
    errors = {
        result.get("error", "") for name, result in record["results"].items() if name not in ("routing", "sharding")
    }
    return errors.pop() if len(errors) == 1 else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_short(cell.replace('|', '/')) for cell in cells)} |"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _name(record: Record) -> str:
    return f"{record['name']} ({record['version']})" if record["version"] else str(record["name"])


def _result(record: Record, check: str) -> Mapping[str, Any]:
    """Return the result of a check, {} where it was not run."""
    result: Mapping[str, Any] = record["results"].get(check, {})
    return result


def _or_error(result: Mapping[str, Any], key: str, form: str = "") -> str:
    if not result:
        return "-"
    return str(result["error"]) if "error" in result else f"{result[key]:{form}}"


def _rule(record: Record) -> str:
    return _or_error(_result(record, "rule"), "rule")


def _rule_cosine(record: Record) -> str:
    result = _result(record, "rule")
    return f"{result['cosine']:.4f}" if "cosine" in result else "-"


def _scale(record: Record) -> str:
    return _or_error(_result(record, "scale"), "cosine", ".3f")


def _nan(record: Record) -> str:
    return _or_error(_result(record, "nan"), "outcome")


def _bytes(record: Record) -> str:
    return _or_error(_result(record, "bytes"), "bytes_per_parameter", ".3f")


def _time(record: Record) -> str:
    return _or_error(_result(record, "step time"), "ratio", ".2f")


def _resume(record: Record, check: str) -> str:
    result = _result(record, check)
    if not result or "error" in result:
        return _or_error(result, "")
    told = "bitwise" if result["is_bitwise"] else f"next update: cosine {result['cosine']:.4f}"
    return "; ".join([told, *result["notes"]])


def _sharding(record: Record) -> str:
    result = _result(record, "sharding")
    if "cosine" not in result:
        return _or_error(result, "outcome")
    return f"cosine {result['cosine']:.4f}"


def _resharding(record: Record) -> str:
    result = _result(record, "sharding")
    if "reshard_cosine" in result:
        return f"cosine {result['reshard_cosine']:.4f}"
    return str(result["outcome"]) if "cosine" in result else "-"


def _kind(kind: str) -> Any:
    def column(record: Record) -> str:
        result = _result(record, "routing")
        return str(result["kinds"][kind]) if "kinds" in result else _or_error(result, "")

    return column
