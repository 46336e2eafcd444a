from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.finetune.engine.checkpoint import Checkpoint, read, read_newest, write


def make(step: int, attempt: int = 1, **state: object) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    a, b = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
    return Checkpoint(
        "f" * 64,
        attempt,
        step,
        trainable={"layers.0.q_proj.A": a, "layers.0.q_proj.B": a.T},  # a view that is not contiguous
        frozen={"layers.0.q_proj.A0": b.double()},
        moments={"exp_avg": {"layers.0.q_proj.A": b}, "exp_avg_sq": {"layers.0.q_proj.A": b.bfloat16()}},
        state=state,
    )


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    def tensors(c: Checkpoint) -> dict[str, torch.Tensor]:
        parts = {"t": c.trainable, "f": c.frozen, **c.moments}
        return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}

    mine, theirs = tensors(one), tensors(other)
    return (
        (one.fingerprint, one.attempt, one.step) == (other.fingerprint, other.attempt, other.step)
        and mine.keys() == theirs.keys()
        and all(t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in mine.items())
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = make(15, curve=[{"loss": 0.1 + 0.2}], smoothed=None, worst=math.inf)
    found = read(write(tmp_path, saved))
    assert equal(found, saved)
    assert found.state == saved.state


def test_a_lane_that_has_not_stepped_has_no_moments(tmp_path: Path) -> None:
    a = {"q.A": torch.ones(2)}
    write(tmp_path, Checkpoint("f", 0, 0, a, {}, {"exp_avg": {}, "exp_avg_sq": {}}))
    found = read_newest(tmp_path, print)
    assert found is not None
    assert torch.equal(found.trainable["q.A"], a["q.A"])
    assert found.frozen == found.moments == {}


def test_the_newest_checkpoint_over_all_attempts_is_read(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "nothing", print) is None
    for attempt, step in [(2, 30), (9, 15), (10, 30)]:
        write(tmp_path, make(step, attempt))
    found = read_newest(tmp_path, print)
    assert found is not None
    assert (found.step, found.attempt) == (30, 10)  # attempts are ordered as numbers: 2, 9, 10


def test_two_checkpoints_are_kept_of_an_attempt(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, make(step))
    write(tmp_path, make(5, attempt=2))
    kept = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert kept == [
        "1/step-00000015.safetensors",
        "1/step-00000020.safetensors",
        "2/step-00000005.safetensors",
    ]


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_checkpoint_is_skipped_with_a_warning(tmp_path: Path, keep: int) -> None:
    write(tmp_path, make(5))
    truncated = write(tmp_path, make(10))
    truncated.write_bytes(truncated.read_bytes()[:keep])
    warnings: list[str] = []
    found = read_newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 5
    (line,) = warnings
    assert line.startswith(f"skipped the damaged checkpoint {truncated}: ")
    assert "\n" not in line


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """One bit of each byte of the file is flipped: of the header, the JSON and the tensors."""
    older = write(tmp_path, make(5, curve=[{"loss": 0.25}]))
    path = write(tmp_path, make(10, curve=[{"loss": 0.25}]))
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
        )
        warnings: list[str] = []
        found = read_newest(tmp_path, warnings.append)
        assert found is not None, position
        # A flipped bit of the header's padding changes no content.
        assert (found.step, len(warnings)) == (5, 1) or equal(found, make(10)), position
        assert found.state == {"curve": [{"loss": 0.25}]}
    assert older.exists()


def test_files_that_are_no_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path, make(5)).parent
    # A writer died before its rename.
    (folder / ".step-00000009.safetensors.77").write_bytes(b"half")
    (folder / "step-x.safetensors").write_bytes(b"no number")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "step-00000099.safetensors").write_bytes(b"no attempt")
    found = read_newest(tmp_path, print)
    assert found is not None
    assert found.step == 5


def test_a_safetensors_file_of_another_program_is_skipped(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path, make(5))
    save_file({"weight": torch.ones(2)}, tmp_path / "1" / "step-00000099.safetensors")
    found = read_newest(tmp_path, print)
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize("other", ["another lane's", "of another step"])
def test_a_checkpoint_in_the_place_of_another_is_skipped_with_a_warning(tmp_path: Path, other: str) -> None:
    """Undamaged files were swapped, renamed, or copied to the path of another checkpoint."""
    mine = tmp_path / ("f" * 64)
    write(mine, make(5))
    path = write(mine, make(10))
    if other == "another lane's":
        theirs = write(tmp_path / ("e" * 64), replace(make(10), fingerprint="e" * 64))
        path.write_bytes(theirs.read_bytes())
    else:
        path = path.rename(path.with_name("step-00000012.safetensors"))
    warnings: list[str] = []
    found = read_newest(mine, warnings.append, "f" * 64)
    assert found is not None
    assert found.step == 5
    (line,) = warnings
    assert line.startswith(f"skipped the damaged checkpoint {path}: ")
    assert ("eeeeeeeeeeee" if other == "another lane's" else "step 10") in line
