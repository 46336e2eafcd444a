"""The adapters that a trainer writes before the records of finished lanes."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import (
    Script,
    configuration,
    get_record,
    leases,
    tiny_base_model,
    tiny_data,
    train,
)

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import variant_settings
from orchestrator.record.store import Store, adapter_file_name
from orchestrator.study.configuration import Configuration
from orchestrator.util.atomic_files import DamagedFileError
from variants.adapters import Adapters

VARIANTS = ("lora", "pissa", "hydra_lora", "full")
"""A batched variant, one with frozen factors, one without PEFT's format, and one that trains the model."""


def restore(path: Path, adapters: Adapters, one: Configuration) -> None:
    tensor_files.restore_adapter(path, adapters, one.fingerprint, variant_settings(one), one.seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kept_adapter_is_the_lane_bit_for_bit(variant: str, store: Store, tmp_path: Path) -> None:
    one = configuration(variant=variant, steps=4, evaluations=1, alpha=None if variant == "full" else 8.0)
    train(Script(leases([one])), store, adapters=store.adapters)
    (path,) = store.adapters.iterdir()
    assert path.name == adapter_file_name(one.fingerprint)
    engine = Engine(tiny_base_model, store.calibration, tiny_data())
    engine.prepare_lane_group(one)
    adapters = engine.lane_group.adapters
    restore(path, adapters, one)
    again = tmp_path / "again" / path.name
    tensor_files.write_adapter(again, adapters, one.fingerprint)
    assert again.read_bytes() == path.read_bytes()


def test_only_finished_lanes_have_adapters_and_only_where_asked(store: Store) -> None:
    good, bad = configuration(steps=2, evaluations=1), configuration(rate=1e30, steps=2, evaluations=1)
    train(Script(leases([good, bad])), store, adapters=store.adapters)
    assert get_record(store, bad).state == "diverged"
    assert [path.name for path in store.adapters.iterdir()] == [adapter_file_name(good.fingerprint)]
    train(Script(leases([configuration(seed=1, steps=2, evaluations=1)])), store)
    assert len(list(store.adapters.iterdir())) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), ValueError("odd")],
)
def test_an_adapter_that_cannot_be_written_costs_no_record(
    error: Exception, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(tensor_files, "write_adapter", refuse)
    one = configuration(steps=2, evaluations=1)
    source = Script(leases([one]))
    train(source, store, adapters=store.adapters)
    assert get_record(store, one).state == "finished"
    assert any("is not kept" in line for line in source.said)


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.with_name("other").read_bytes()),
    ],
)
def test_a_damaged_or_another_lanes_file_is_refused(damage, store: Store) -> None:
    one, other = configuration(steps=2, evaluations=1), configuration(seed=1, steps=2, evaluations=1)
    engine = Engine(tiny_base_model, store.calibration, tiny_data())
    engine.prepare_lane_group(one)
    adapters = engine.lane_group.adapters
    for lane, name in ((one, "one"), (other, "other")):
        adapters.add_lane(lane.fingerprint, variant_settings(lane), lane.seed)
        tensor_files.write_adapter(store.adapters / name, adapters, lane.fingerprint)
        adapters.remove_lane(lane.fingerprint)
    damage(store.adapters / "one")
    with pytest.raises(DamagedFileError):
        restore(store.adapters / "one", adapters, one)
    assert adapters.lanes == ()
