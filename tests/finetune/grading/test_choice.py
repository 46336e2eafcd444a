"""Grades of multiple-choice answers against labels written by hand."""

from __future__ import annotations

from pathlib import Path

import yaml

from orchestrator.finetune.grading.choice import grade


def test_grades_agree_with_labels_written_by_hand() -> None:
    groups = yaml.safe_load((Path(__file__).parent / "choices.yaml").read_text("utf-8"))
    found = [
        (group["reference"], answer)
        for group in groups
        for label in ("right", "wrong")
        for answer in group[label]
        if grade(answer, group["reference"]) != float(label == "right")
    ]
    assert found == []
