from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.finetune.engine.tensor_files import Checkpoint, find_newest, read_checkpoint
from orchestrator.finetune.engine.tensor_files import write_checkpoint as write


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


def read_newest(folder: Path, warn: Callable[[str], None], fingerprint: str = "") -> Checkpoint | None:
    path = find_newest(folder, warn, fingerprint)
    return None if path is None else read_checkpoint(path)


def test_round_trip(tmp_path: Path) -> None:
    saved = make(15, curve=[{"loss": 0.1 + 0.2}], smoothed=None, worst=math.inf)
    found = read_checkpoint(write(tmp_path, saved))
    assert equal(found, saved)
    assert found.state == saved.state


def test_the_newest_checkpoint_over_all_attempts_is_read(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "nothing", print) is None
    for attempt, step in [(2, 30), (9, 15), (10, 30)]:
        write(tmp_path, make(step, attempt))
    found = read_newest(tmp_path, print)
    assert found is not None
    assert (found.step, found.attempt) == (30, 10)  # attempts are ordered as numbers: 2, 9, 10


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
