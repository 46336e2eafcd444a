"""The analysis of a study: it turns the records of the study into `Results`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import costs, curves, runs, stats
from orchestrator.analyze.answers import answer_frame
from orchestrator.analyze.limits import find_limits
from orchestrator.analyze.results import HARNESS_COLUMNS, Results
from orchestrator.analyze.verdicts import Verdict, find_verdicts
from orchestrator.record.harness import HarnessScore, base_subject, read_results
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, find_study
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
)
from orchestrator.study.names import default_output
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


def analyze(study: StudyFile, records: Iterable[Record]) -> Results:
    """Analyze a study.

    Args:
        study: The study. `study.settings` determine how its records are analyzed.
        records: The records of the study's configurations, in any order. If a configuration has several
            records, `runs.distinct_records` chooses one of them. Without a record, each frame has its columns
            and no row.
    """
    import pandas as pd

    named = [study.rename(record) for record in runs.distinct_records(records)]
    if not named:
        return _without_rows(analyze(study, [_failed_record()]))
    kept = list(map(runs.select_on_test, named)) if study.settings.select == "published" else named
    frame = runs.run_frame(study, kept)
    missing = bool(set(study.configurations) - set(frame["fingerprint"]))
    kind, more = study.settings.kind, {}
    shown = frame
    if kind == "factors":
        from orchestrator.analyze.factors import FactorStudy, find_stars

        stars = find_stars(study.in_order(kept))
        found = FactorStudy(stars, frame, study.settings)
        more = {"factors": found.factors, "replacements": found.replacements, "claims": found.claims}
        if stars:
            shown = frame[frame["fingerprint"].isin([f for star in stars for f in star.curve])]
    if kind == "transfer":
        from orchestrator.analyze.transfer import transfer_frames

        panel_of = frame.set_index("fingerprint")["panel"].to_dict()
        more = transfer_frames(study.in_order(kept), panel_of, study.settings)
    points = curves.make_points(frame)
    if kind in ("curve", "factors", "transfer"):
        best, panels = curves.best_of_curves(shown, points[points["group"].isin(shown["group"])])
        if kind == "curve":
            more = _compare_curves(frame, best, panels)
        elif kind == "factors" and not stars:  # no curve has a score
            best, panels = best.head(0), panels.head(0)
    else:
        best, panels = curves.best_of_groups(frame, points)
    chosen = best.set_index(["panel", "curve"])
    if kind == "replicates":
        from orchestrator.analyze.comparison import compare_tuned

        items = {r.fingerprint: own for r in kept if (own := runs.item_results(r, "test")) is not None}
        more = compare_tuned(frame, best, study.settings, items, missing)
        compared = more["comparison"]
        # A row of `best` is one replicate. Without a comparison, there is no score of a variant as a whole.
        chosen = chosen.head(0) if compared.empty else compared.set_index(["panel", "variant"])
    if kind not in ("search", "transfer"):  # the latter compares best rates by `by`, as powers
        from orchestrator.analyze.ratios import ratio_rows

        references = panels.set_index("panel")["reference"].to_dict()
        if kind == "replicates":
            references = dict.fromkeys(references, study.settings.baseline)
        more["ratios"] = pd.DataFrame(ratio_rows(shown, points, best, references))
    points = _with_settings(points, frame).sort_values("validation_score", ascending=False, ignore_index=True)
    more |= {"costs": costs.cost_frame(shown, chosen), "best_lanes": find_best_lanes(study, named)}
    results = Results(study, named, frame, points, best, panels, **more)
    verdicts = pd.DataFrame(map(asdict, find_verdicts(results)), columns=[f.name for f in fields(Verdict)])
    return replace(results, verdicts=verdicts, warnings=find_limits(results), answers=answer_frame(results))


def find_best_lanes(study: StudyFile, records: Iterable[Record]) -> pd.DataFrame:
    """Return the best point and its best run for each task, base model and variant of a study.

    Args:
        study: The study.
        records: The records of the study's configurations. Configurations may lack a record.
    """
    import pandas as pd

    named = [study.rename(record) for record in runs.distinct_records(records)]
    # A failed record gives the frame its columns, and it adds no lane.
    rows = [runs.lane_row(record, study.settings.kind) for record in named or [_failed_record()]]
    return curves.best_lanes(curves.make_points(pd.DataFrame(rows)))


def _failed_record() -> Record:
    """Return a record of a failed run, from which the frames of a study without records get their columns."""
    own = Configuration(
        VariantChoice("lora"),
        TaskChoice("none", "", 1, 1, 1, "none", 0.0),
        ModelChoice("none", ""),
        OptimizerConfig(1.0),
        LRSchedule(1),
        BatchConfig(1),
    )
    return Record(own.fingerprint, own, "failed", 0)


def _without_rows(found: Results) -> Results:
    names = [each.name for each in fields(found) if each.name not in ("study", "records", "warnings")]
    return replace(found, records=(), warnings=(), **{name: getattr(found, name).head(0) for name in names})


def _compare_curves(frame: pd.DataFrame, best: pd.DataFrame, panels: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the frames `fixed_rate` and `winners` of a grid."""
    import pandas as pd

    from orchestrator.analyze.comparison import compare_curves_at_fixed_rate

    parts: Mapping[str, list[Any]] = {"fixed_rate": [], "winners": []}
    for panel, reference in zip(panels["panel"], panels["reference"], strict=True):
        own_runs, own_best = (each[each["panel"] == panel] for each in (frame, best))
        found = compare_curves_at_fixed_rate(own_runs, own_best, reference, curves.TOLERANCE)
        for rows, part in zip(found, parts.values(), strict=True):
            part += [{"panel": panel, **row} for row in rows]
    return {name: pd.DataFrame(rows) for name, rows in parts.items()}


def _with_settings(points: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Add the title of the task and the values of all hyperparameters that the study varies to the points."""
    varied = [name for name in curves.varied_settings(frame) if name != "learning_rate"]
    columns = [name for name in dict.fromkeys(["task_title", *varied]) if name not in points]
    values = frame.drop_duplicates(["panel", "point"]).set_index(["panel", "point"])[columns]
    return points.join(values, on=["panel", "point"])


def load(study: str, *, output: str | Path | None = None, store: str | Path | None = None) -> Results:
    """Load the results of a study.

    Args:
        study: The study's name, which is the name of its folder.
        output: The folder that contains the folders of studies; by default the environment variable
            ORCHESTRATOR_OUTPUT, or `results` if it is not set.
        store: The folder of the records; by default `store` in the output folder.

    Returns:
        The results at the time of the call. If the study is still running, a later call may return more.

    Raises:
        UsageError: The study or the store does not exist, or none of the study's configurations has a record.
    """
    folder = Path(output) if output is not None else default_output()
    opened = Store(Path(store) if store is not None else folder / "store", create=False)
    study_file = find_study(folder, study)
    found = [record for f in study_file.configurations if (record := opened.get(f)) is not None]
    if not found:
        raise UsageError(
            f"study {study_file.name!r}: no record of it in {opened.root}; run it: {study_file.command}"
        )
    return with_harness(analyze(study_file, found), opened.harness)


def with_harness(results: Results, folder: Path) -> Results:
    """Return results with the frame `harness`: the scores of the study's lanes that the store has.

    Args:
        results: The results of a study.
        folder: The store's folder `harness`.

    Raises:
        UsageError: A file with scores is damaged.
    """
    import numpy as np
    import pandas as pd

    @cache
    def read_untrained(subject: str) -> dict[tuple[str, str, str], HarnessScore]:
        found = read_results(folder, subject)
        return {(each.digest, score.subtask, score.metric): score for each in found for score in each.scores}

    lanes = results.runs.set_index("fingerprint")[["panel", "curve"]]
    rows: list[tuple[Any, ...]] = []
    for record in results.records:
        for each in read_results(folder, record.fingerprint):
            base = read_untrained(base_subject(record.configuration.model))
            for own in each.scores:
                key = (own.subtask, own.metric)
                before = base.get((each.digest, *key), HarnessScore(*key, math.nan))
                difference = stats.Estimate(own.score - before.score)
                if len(own.items) == len(before.items) > 1:
                    over_items = stats.mean_interval(np.subtract(own.items, before.items))
                    # The score of a metric such as perplexity is no mean over items.
                    if math.isclose(over_items.mean, difference.mean, abs_tol=1e-6):
                        difference = over_items
                about = (*lanes.loc[record.fingerprint], record.fingerprint, each.task, each.settings, *key)
                scores = (own.score, len(own.items), before.score, *difference[:3])
                rows.append((*about, *scores, own in each.whole()))
    return replace(results, harness=pd.DataFrame(rows, columns=HARNESS_COLUMNS))
