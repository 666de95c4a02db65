"""A checkpoint's manifest: every flipped bit is found, by name; what is not a whole checkpoint has no name."""

from __future__ import annotations

import hashlib
import json
import platform

import pytest

from finetune.storage.checkpoints import (
    MANIFEST,
    complete,
    file_names,
    find_damage,
    named_checkpoints,
    partial_checkpoint,
    remove,
    remove_leftovers,
    seal_files,
)
from finetune.storage.run_dir import folder_beside


def write(run, step, content=b"weights"):
    partial = partial_checkpoint(run, step)
    (partial / "shards").mkdir(parents=True)
    (partial / "progress.json").write_text('{"step": 1}')
    (partial / "empty").touch()
    (partial / "shards" / "0.bin").write_bytes(content)
    return partial


@pytest.fixture
def checkpoint(tmp_path):
    partial = write(tmp_path, 3)
    return complete(partial, seal_files(partial, file_names(partial)))


def test_the_manifest_holds_size_and_sha256_of_every_other_file(checkpoint, tmp_path):
    assert checkpoint == tmp_path / "checkpoints" / "step-0000003"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    files = {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    files.pop(MANIFEST)
    assert set(files) == {"empty", "progress.json", "shards/0.bin"}
    assert listed == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert find_damage(checkpoint) is None


def test_a_flipped_bit_in_any_byte_of_every_file_is_found_and_named(checkpoint):
    """The manifest's own bytes included: one bit of each in turn, and the bit that changes a letter's case."""
    count = 0
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for place, value in enumerate(content):
            for bit in {place % 8, 5}:
                flipped = bytearray(content)
                flipped[place] = value ^ 1 << bit
                path.write_bytes(flipped)
                damage = find_damage(checkpoint)
                assert damage is not None, (path.name, place, bit)
                # A flip in the manifest's text may also read as the damage of a file that it lists.
                assert path.name == MANIFEST or path.relative_to(checkpoint).as_posix() in damage
                count += 1
        path.write_bytes(content)
    assert count > 500
    assert find_damage(checkpoint) is None


def test_a_missing_or_truncated_file_is_named_with_the_reason(checkpoint):
    (checkpoint / "shards" / "0.bin").write_bytes(b"weig")
    assert find_damage(checkpoint) == "shards/0.bin has 4 bytes instead of 7"
    (checkpoint / "shards" / "0.bin").unlink()
    assert find_damage(checkpoint) == "shards/0.bin cannot be read (No such file or directory)"
    (checkpoint / MANIFEST).write_text('{"files": {}}')
    assert find_damage(checkpoint) == "manifest.json is not as it was written"
    (checkpoint / MANIFEST).unlink()
    assert find_damage(checkpoint) == "manifest.json cannot be read (No such file or directory)"


@pytest.mark.parametrize("foreign", [True, False])
def test_files_that_no_process_sealed_or_that_are_not_there_give_no_checkpoint(tmp_path, foreign):
    """As on machines that do not see one file system: what each lists is not what the main process has."""
    partial = write(tmp_path, 3)
    files = seal_files(partial, file_names(partial))
    path = partial / "random_states_1.pkl"
    if foreign:
        path.touch()
    else:
        files[path.name] = files["empty"]
    with pytest.raises(OSError, match="one file system"):
        complete(partial, files)
    assert named_checkpoints(tmp_path) == []


def test_the_parts_of_several_processes_cover_every_file_once(checkpoint):
    for name in file_names(checkpoint):
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(content + b"x")
        for num_parts in (1, 2, 3, 5):
            found = [find_damage(checkpoint, part, num_parts) for part in range(num_parts)]
            assert sum(damage is not None for damage in found) == 1
        path.write_bytes(content)


def test_leftovers_and_removed_checkpoints_have_no_name(checkpoint, tmp_path):
    write(tmp_path, 12)
    checkpoint.with_name(".step-0000001.old").mkdir()
    assert named_checkpoints(tmp_path) == [checkpoint]
    remove_leftovers(tmp_path)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    remove(checkpoint)
    remove(checkpoint)
    assert list(checkpoint.parent.iterdir()) == []


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (10_000_000, 9_999_999, 5):
        partial = write(tmp_path, step)
        complete(partial, seal_files(partial, file_names(partial)))
    assert [p.name for p in named_checkpoints(tmp_path)] == ["step-0000005", "step-9999999", "step-10000000"]


def test_two_writers_of_equal_pids_neither_share_nor_remove_each_others_scratch(tmp_path, monkeypatch):
    """As on two nodes, or in two containers, that share one cache."""
    monkeypatch.setattr("os.getpid", lambda: 4711)
    wanted = tmp_path / "tokens"
    with folder_beside(wanted) as one:
        (one / "train.bin").write_bytes(b"one")
        with folder_beside(wanted) as other:
            assert list(other.iterdir()) == []
            (other / "train.bin").write_bytes(b"other")
        assert (one / "train.bin").read_bytes() == b"one"
        assert (wanted / "train.bin").read_bytes() == b"other"
    assert (wanted / "train.bin").read_bytes() == b"other"
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert platform.node() in one.name


def test_scratch_that_is_there_already_is_refused_instead_of_emptied(tmp_path, monkeypatch):
    taken = tmp_path / ".taken"
    taken.mkdir()
    (taken / "theirs").touch()
    monkeypatch.setattr("finetune.storage.run_dir.scratch_beside", lambda _: taken)
    with pytest.raises(FileExistsError), folder_beside(tmp_path / "folder"):
        pass
    assert [path.name for path in taken.iterdir()] == ["theirs"]
