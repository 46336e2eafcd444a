"""The saved views as MLflow's page reads them."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from orchestrator.record.mlflow import run_content, saved_view


def _state(tag: str) -> dict[str, Any]:
    envelope = json.loads(tag)
    assert (envelope["createdAt"], envelope["updatedAt"]) == (7, 7)
    return json.loads(zlib.decompress(base64.b64decode(envelope["state"].removeprefix("deflate;"))))


def _params(make_record, *changes: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {p.key: p.value for p in run_content.params(make_record(**change).configuration)}
        for change in changes
    ]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ([{"seed": 0}, {"seed": 1}], ("variant", "learning_rate")),
        # Another variant has other hyperparameters of its own, which the variant's name implies.
        ([{}, {"variant": "vera", "extra": {"d_initial": 0.1}}], ("variant", "learning_rate")),
        ([{"extra": {"ratio": 4}}, {"extra": {"ratio": 16}}], ("variant", "learning_rate", "variant_ratio")),
    ],
)
def test_runs_of_one_group_differ_in_the_seed_only(make_record, changes, keys):
    assert saved_view.group_keys(_params(make_record, *changes)) == keys


def test_several_tasks_are_grouped_by_task(make_record):
    (first,) = _params(make_record, {})
    second = {**first, "task": "digits", "task_revision": "fedcba", "steps_horizon": "40"}
    assert saved_view.group_keys([first, second]) == ("task", "variant", "learning_rate")
    less = {**first, "task_train_size": "64", "task_revision": "abcdef"}
    assert saved_view.group_keys([first, less]) == ("variant", "learning_rate", "task_train_size")
    changed = {**first, "task_revision": "abcdef"}  # the file of the task's data has changed
    assert saved_view.group_keys([first, changed]) == ("variant", "learning_rate", "task_revision")
    assert saved_view.group_runs({"a": first, "b": second}, ("task", "rank")) == {
        ("letters", "8"): ["a"],
        ("digits", "8"): ["b"],
    }


def test_the_table_is_grouped_and_ranked_and_its_groups_are_closed():
    tags = saved_view.tags(7, ("variant", "learning_rate"), [("lora", "0.001"), ("dora", "0.001")])
    assert set(tags) == {"mlflow.sharedViewState.ranking", "mlflow.sharedViewState.charts"}
    state = _state(tags["mlflow.sharedViewState.ranking"])
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`mean_validation_score`", False)
    assert state["groupBy"] == {
        "aggregateFunction": "average",
        "groupByKeys": [
            {"mode": "param", "groupByData": "variant"},
            {"mode": "param", "groupByData": "learning_rate"},
        ],
    }
    assert state["groupsExpanded"] == {
        "param.variant.lora,param.learning_rate.0.001": False,
        "param.variant.dora,param.learning_rate.0.001": False,
    }
    assert set(state["selectedColumns"]) <= set(state["columnOrder"])


def test_both_views_have_the_three_charts():
    for tag in saved_view.tags(7, ("variant", "learning_rate"), []).values():
        state = _state(tag)
        charts = {chart["type"]: chart for chart in state["compareRunCharts"]}
        assert set(charts) == {"SCATTER", "PARALLEL", "LINE"}
        assert charts["SCATTER"]["xaxis"]["key"] == "log10_learning_rate"
        assert charts["LINE"]["selectedMetricKeys"] == ["train_loss"]
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in charts.values()} <= sections
        # MLflow's page refuses to average names, so a grouped view has no axis of names.
        assert charts["PARALLEL"]["selectedParams"] == ([] if state["groupBy"] else ["variant"])


def test_a_tag_is_never_longer_than_mlflow_accepts():
    many = [(f"variant{number}", f"{number * 1e-7}") for number in range(3000)]
    tags = saved_view.tags(7, ("variant", "learning_rate"), many)
    assert all(len(value) <= saved_view.MAX_LENGTH for value in tags.values())
    assert _state(tags["mlflow.sharedViewState.ranking"])["groupsExpanded"] == {}


@pytest.mark.parametrize(
    ("uri", "server"),
    [("sqlite:////x/mlflow.db", "http://127.0.0.1:5000"), ("https://me:secret@host:1/", "https://host:1")],
)
def test_the_link_leads_to_the_server_or_to_one_on_this_machine(uri, server):
    assert saved_view.link(uri, "12") == (
        f"{server}/#/experiments/12/runs?workflowType=machine_learning&viewStateShareKey=ranking"
    )


def test_a_long_note_is_cut_at_the_end_of_a_line():
    note = run_content.limit_note("word " * 10 + "\n" + "line\n" * 2000)
    assert len(note) <= 5000
    assert note.endswith("line\n\n(more in report.html)")
