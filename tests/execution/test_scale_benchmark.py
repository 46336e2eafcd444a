"""experiments/benchmarks/scale.py: a study on real Ray whose training is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale
from ray.cluster_utils import Cluster

from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_simulated_study_is_measured(connected: Cluster, tmp_path: Path) -> None:
    options = scale.Options(output=tmp_path, nodes=1, gpus_per_trainer=0.0)
    row = scale._run_study(options, scale.build_configurations(10), Store(tmp_path / "store"))
    assert row["records"] == 10
    assert "failed" not in row["states"]
    assert row["broker_calls_per_second"] > 0
