"""The results of a study as pandas frames, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.analyze.panels import deduplicate_records
from orchestrator.analyze.results import Summary
from orchestrator.analyze.run_labels import USABLE, label_runs
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.task_titles import entitle
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import find_study
from orchestrator.record.tables import make_tables
from orchestrator.study.names import default_output
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

_POINT_COLUMNS = ("task", "task_title", "model", "variant", "learning_rate")
_SCORES = ("validation_score", "test_score")


@dataclass(frozen=True)
class StudyFrames:
    """The results of a study as pandas frames."""

    name: str
    runs: pd.DataFrame
    """One row per configuration with a record, with the columns of `records.parquet`, and `label`: the state,
    or "collapsed" for a run that finished without a useful result. `task` is the name of the task (of a
    user's task the name of its file), and `task_title` the name that the report and `summary` have."""
    curves: pd.DataFrame
    """One row per configuration and step, with the columns of `curves.parquet`: training loss, gradient norm,
    learning rate, and the scores of the evaluations."""
    points: pd.DataFrame
    """One row per task, model, variant, learning rate and values of the other hyperparameters that the study
    varies, the best validation score first. Further columns: `seeds`, the number of seeds; `usable`, the
    number of finished runs that did not collapse; and the mean and the standard deviation over runs of both
    scores (`validation_score`, `validation_score_std`, `test_score`, `test_score_std`)."""
    verdicts: pd.DataFrame
    """One row per verdict, the most important first. The columns are the fields of `Verdict`."""
    summary: Summary
    """All numbers of the report, as the analysis returns them."""

    def __repr__(self) -> str:
        return f"<Results of {self.name}: {len(self.runs)} runs, {len(self.points)} points>"


def load(study: str, *, output: str | Path | None = None, store: str | Path | None = None) -> StudyFrames:
    """Load the results of a study.

    Args:
        study: The study's name, which is the name of its folder.
        output: The folder with the studies' folders; by default ORCHESTRATOR_OUTPUT, else `results`.
        store: The folder of the records; by default `store` in the output folder.

    Returns:
        The results that exist now. A running study has more results later.

    Raises:
        UsageError: There is no such study or no such store, or none of the study's configurations has a
            record.
    """
    folder = Path(output) if output is not None else default_output()
    opened = Store(Path(store) if store is not None else folder / "store", create=False)
    study_file = find_study(folder, study)
    found = [record for f in study_file.configurations if (record := opened.get(f)) is not None]
    if not found:
        raise UsageError(
            f"study {study_file.name!r}: no record of it in {opened.root}; run it: {study_file.command}"
        )
    records = deduplicate_records([study_file.rename(record) for record in found])
    entitled = deduplicate_records(entitle(study_file, found))
    summary = summarize(study_file, entitled)
    tasks = [record.configuration.task for record in entitled]
    titles = {task.content: task.name for task in tasks if task.content}
    studies = {record.fingerprint: (study_file.name,) for record in records}
    runs, curves = (table.to_pandas() for table in make_tables(records, studies, titles))
    runs.insert(runs.columns.get_loc("state") + 1, "label", runs["fingerprint"].map(label_runs(records)))
    return StudyFrames(
        study_file.name,
        runs,
        curves,
        _points_frame(runs, records),
        _verdicts_frame(summary.verdicts),
        summary,
    )


def _points_frame(runs: pd.DataFrame, records: Sequence[Record]) -> pd.DataFrame:
    hyperparameters = {name for record in records for name in record.configuration.to_columns()}
    varied = [
        name
        for name in runs.columns
        if name in hyperparameters - {"seed", *_POINT_COLUMNS} and runs[name].nunique(dropna=False) > 1
    ]
    grouped = runs.assign(is_usable=runs["label"] == USABLE).groupby([*_POINT_COLUMNS, *varied], dropna=False)
    statistics = {"seeds": ("seed", "nunique"), "usable": ("is_usable", "sum")}
    for score in _SCORES:
        statistics |= {score: (score, "mean"), f"{score}_std": (score, "std")}
    points: pd.DataFrame = grouped.agg(**statistics).reset_index()
    return points.sort_values("validation_score", ascending=False, ignore_index=True)


def _verdicts_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([asdict(v) for v in verdicts], columns=[field.name for field in fields(Verdict)])
