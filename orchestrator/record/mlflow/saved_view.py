"""Saved views of a study in MLflow's UI: a ranked table of groups of runs, and charts of all runs.

MLflow keeps a view as a tag of the experiment, `mlflow.sharedViewState.<key>`. The tag holds a name, times,
and the state of the experiment's page as JSON, which may be compressed. Source: MLflow 3.17,
`savedViewEnvelope.ts`, `ExperimentPageUIState.tsx`, `ExperimentPageSearchFacetsState.tsx` and
`runs-charts.types.ts` in its folder `mlflow/server/js/src/experiment-tracking`. A page ignores the fields
that it does not know.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

RANKING_KEY, CHARTS_KEY = "ranking", "charts"
"""Keys of the two views, with which the names of the tags and the links end."""
MAX_LENGTH = 5000
"""Maximum length of an experiment's tag in characters, in MLflow 2 and on MySQL."""
RUN_ROLE = "configuration"
"""Value of the tag `role` of the runs that the views show: all except the study's own run."""
MEAN_METRIC = "mean_validation_score"
"""Mean of the validation scores of a run's group. The table is sorted by it. MLflow's page reads 100 runs at
a time; sorted by a run's own score, it would show the mean of a group without the group's worst runs."""

_TAG_PREFIX = "mlflow.sharedViewState."
_BASIC_GROUP_KEYS = ("task", "variant", "learning_rate")
_NOT_GROUPING = ("seed", "model_content", "task_revision")
_CONTENTS = ("model_content", "task_revision")
"""Parameters that identify contents of files. Runs are grouped by them only if no other key distinguishes the
contents."""
_SECTION = "study"


def group_keys(runs: Collection[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the parameters by which runs are grouped, so that the runs of a group differ in the seed only.

    Args:
        runs: The parameters of each run: name -> value.

    Returns:
        The variant and the learning rate; the task if there are several; every other hyperparameter in which
        two runs of one task, variant and learning rate differ; and the content of a file if it has changed
        between runs that are otherwise in one group.
    """
    first: dict[tuple[str, ...], Mapping[str, str]] = {}
    varied: dict[str, None] = {}
    for params in runs:
        other = first.setdefault(_values(params, _BASIC_GROUP_KEYS), params)
        if other is not params:
            differing = (key for key in params if params[key] != other.get(key))
            varied |= {key: None for key in differing if key not in _NOT_GROUPING}
    tasks = {params.get("task") for params in runs}
    keys = (*_BASIC_GROUP_KEYS[len(tasks) <= 1 :], *varied)
    count = len({_values(params, keys) for params in runs})
    contents = (key for key in _CONTENTS if len({_values(params, (*keys, key)) for params in runs}) > count)
    return (*keys, *contents)


def group_runs(
    runs: Mapping[str, Mapping[str, str]], keys: Sequence[str]
) -> dict[tuple[str, ...], list[str]]:
    """Group runs by their values of `keys`.

    Args:
        runs: The parameters of each run: fingerprint -> name -> value.
        keys: The parameters that the runs of a group share.

    Returns:
        The values of the keys -> the fingerprints of the runs.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for fingerprint, params in runs.items():
        groups.setdefault(_values(params, keys), []).append(fingerprint)
    return groups


def _values(params: Mapping[str, str], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(params.get(key) or "null" for key in keys)


def path(experiment_id: str, key: str = RANKING_KEY) -> str:
    """Return the address of a view, relative to that of the server.

    Args:
        experiment_id: The study's experiment.
        key: The key of the view.
    """
    mode = "compareRunsMode=CHART&" if key == CHARTS_KEY else ""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&{mode}viewStateShareKey={key}"


def link(tracking_uri: str, experiment_id: str) -> str:
    """Return the address of the ranked table, without a user name and password.

    Args:
        tracking_uri: MLflow's tracking URI. For a database, the address is that of `mlflow ui` on this
            machine.
        experiment_id: The study's experiment.
    """
    server = "http://127.0.0.1:5000"
    if tracking_uri.startswith(("http://", "https://")):
        parts = urlsplit(tracking_uri)
        server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    return f"{server}/{path(experiment_id)}"


def markdown_links(experiment_id: str) -> str:
    """Return links to the views, relative to the address of the page, as Markdown for a description."""
    ranking, charts = path(experiment_id), path(experiment_id, CHARTS_KEY)
    return f"[Ranked table]({ranking}) | [Charts]({charts})"


def tags(created: int, keys: Sequence[str], groups: Collection[tuple[str, ...]]) -> dict[str, str]:
    """Return the tags of the experiment that hold the two views.

    Args:
        created: Time of the views' creation in milliseconds since the epoch.
        keys: The parameters by which the runs are grouped.
        groups: The values of `keys` of each group. The table shows these groups closed. If the tag would be
            too long, it names none of them, and MLflow shows them open.
    """
    closed = {
        ",".join(f"param.{key}.{value}" for key, value in zip(keys, group, strict=True)): False
        for group in groups
    }
    name = "Ranking: mean over seeds"
    ranking = _envelope(name, _ranking_state(keys, closed), created)
    if len(ranking) > MAX_LENGTH:
        ranking = _envelope(name, _ranking_state(keys, {}), created)
    charts = _envelope("Charts: all runs, a color for each variant", _charts_state(keys), created)
    return {_TAG_PREFIX + RANKING_KEY: ranking, _TAG_PREFIX + CHARTS_KEY: charts}


def _envelope(name: str, state: Mapping[str, Any], created: int) -> str:
    """Return the value of a view's tag: JSON with the compressed state of the page in it."""
    text = json.dumps(state, separators=(",", ":")).encode()
    packed = "deflate;" + base64.b64encode(zlib.compress(text, 9)).decode()
    return json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": packed})


def _ranking_state(keys: Sequence[str], groups_expanded: Mapping[str, bool]) -> dict[str, Any]:
    grouped = [{"mode": "param", "groupByData": key} for key in keys]
    return {
        **_common_state(),
        "groupBy": {"aggregateFunction": "average", "groupByKeys": grouped},
        "groupsExpanded": dict(groups_expanded),
        "useGroupedValuesInCharts": True,
        "compareRunCharts": _charts([]),
    }


def _charts_state(keys: Sequence[str]) -> dict[str, Any]:
    params = [key for key in keys if key != "learning_rate"]  # it has an axis of its own
    return {**_common_state(), "groupBy": None, "runListHidden": True, "compareRunCharts": _charts(params)}


def _common_state() -> dict[str, Any]:
    metrics = [MEAN_METRIC, "validation_score", "test_score", "train_loss", "seconds"]
    columns = [f"metrics.`{metric}`" for metric in metrics]
    # The time of creation is the second column of MLflow's table, which can be narrow but not left out.
    widths = {"attributes.`Run Name`": 400, "runDateAndNestInfo": 60, **dict.fromkeys(columns, 150)}
    return {
        "searchFilter": f"tags.role = '{RUN_ROLE}'",
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [
            {"uuid": _SECTION, "name": "Study", "display": True, "columns": 2, "cardHeight": 400},
            {"uuid": "model", "name": "Model metrics", "display": False},
            {"uuid": "system", "name": "System metrics", "display": False},
        ],
    }


def _charts(params: Sequence[str]) -> list[dict[str, Any]]:
    common = {"metricSectionId": _SECTION, "deleted": False, "isGenerated": False, "runsCountToCompare": 1000}
    return [
        {
            "uuid": "score-by-rate",
            "type": "SCATTER",
            "xaxis": {"key": "log10_learning_rate", "type": "METRIC"},
            "yaxis": {"key": "validation_score", "type": "METRIC"},
            **common,
        },
        {
            "uuid": "parallel",
            "type": "PARALLEL",
            "selectedParams": list(params),
            "selectedMetrics": ["log10_learning_rate", "test_score", "validation_score"],
            "showAllRuns": True,
            **common,
        },
        {
            "uuid": "training-loss",
            "type": "LINE",
            "metricKey": "train_loss",
            "selectedMetricKeys": ["train_loss"],
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "lineSmoothness": 0,
            "displayPoints": False,
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
            **common,
        },
    ]
