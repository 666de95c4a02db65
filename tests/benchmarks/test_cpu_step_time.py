"""The CPU step time's command: its figures from known times, and a whole run on tiny shapes."""

import json

import pytest

from benchmarks.training import cpu_step_time
from benchmarks.training.step_arms import FORMATS, intermediate, matrix_shapes


def test_shapes_are_llamas():
    assert [intermediate(hidden) for hidden in (256, 512, 1024, 4096)] == [768, 1536, 2816, 11008]
    assert matrix_shapes(256, 4) == {(256, 256): 16, (768, 256): 8, (256, 768): 4}


def test_ratios_and_parts_of_known_times():
    """Of two blocks of rounds: torch takes 8 + 2 s, ours 20 s in the first and 10 s in the second."""
    times = {"torch muon": [8.0] * 10, "torch adamw": [2.0] * 10}
    for arm in FORMATS:
        times |= {arm: [20.0] * 5 + [10.0] * 5, f"old {arm}": [40.0] * 10, f"{arm} matrices": [16.0]}
        times |= {f"stats {arm}": [1.0], f"apply {arm}": [2.0]}
    times |= {"newton_schulz": [5.0], "newton_schulz torch": [6.0], "update": [1.0]}
    found = cpu_step_time.figures({**times, "read_write": [0.5], "read_write in cache": [0.25]})
    assert found["whole"]["linear"] == pytest.approx(10 / 15, abs=5e-4)
    assert found["whole_range"]["linear"] == [0.5, 1.0]
    assert found["whole"]["old dynamic"] == 0.25
    assert found["matrices"]["bits32"] == 0.5
    parts = {"newton_schulz": 0.5, "update": 0.1, "stats": 0.1, "apply": 0.2, "adamw": 0.2, "between": 0.4, "step": 1.5}
    assert found["parts"]["linear"] == pytest.approx(parts)
    assert found["parts"]["torch"] == pytest.approx({"newton_schulz": 0.6, "adamw": 0.2, "rest": 0.2, "step": 1.0})


def test_a_run_on_tiny_shapes_beside_another_tree(tmp_path):
    out = tmp_path / "record.json"
    command = ["--old", str(cpu_step_time.ROOT), "--rounds", "2", "--out", str(out), "--sizes"]
    cpu_step_time.main([*command, "32x1"])
    cpu_step_time.main([*command, "64x1"])
    sizes = json.loads(out.read_text())["sizes"]
    size = sizes["64x1"]
    assert sizes.keys() == {"32x1", "64x1"}
    assert size["whole"].keys() == {*FORMATS, *(f"old {arm}" for arm in FORMATS)}
    assert all(ratio > 0 for of in (size["whole"], size["matrices"]) for ratio in of.values())
    assert all(share > 0 for arm in FORMATS for name, share in size["parts"][arm].items() if name != "between")


def test_another_tree_without_the_package_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="was not the one imported"):
        cpu_step_time.OtherTree(tmp_path)
