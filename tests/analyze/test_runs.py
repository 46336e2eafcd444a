"""The frame of runs: labels, titles of tasks, panels, curves, and the choice by test scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from synthetic import analyze_curves, record, study

from orchestrator.analyze import runs
from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.report import describe_study
from orchestrator.record.schema import Evaluation, ItemResults, Provenance, Record
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile

PUBLISHED = StudyFile("mine", "?", "command", settings=AnalysisSettings(select="published"))


def labels_of(*records: Record) -> list[str]:
    found = analyze_curves(records).runs.set_index("fingerprint")["label"]
    return [found[r.fingerprint] for r in records]


# -- labels


def test_runs_at_the_base_are_collapsed_at_and_above_the_best_rate_only() -> None:
    rates = [record(rate=rate, validation=v) for rate, v in ((1e-3, 0.0), (1e-2, 0.9), (1e-1, 0.0))]
    assert labels_of(*rates) == ["finished", "finished", "collapsed"]
    seeds = [record(seed=seed, validation=v) for seed, v in enumerate((0.9, 0.8, 0.0))]
    assert labels_of(*seeds) == ["finished", "finished", "collapsed"]
    assert labels_of(rates[0], record(rate=1e-2, validation=0.0)) == ["finished"] * 2, "nothing was learned"
    other = record(rate=1e-1, validation=0.0, rank=4)
    assert labels_of(rates[1], other) == ["finished"] * 2, "another rank is another curve"


def test_the_base_is_the_untrained_model_or_a_constant_answer_whichever_is_higher() -> None:
    for floor, untrained, base in ((0.2, 0.1, 0.2), (0.0, 0.1, 0.1), (0.2, math.nan, 0.2)):
        assert runs.run_values(record(floor=floor, untrained=untrained), "curve")["base_score"] == base
    found = [record(rate=rate, validation=v, untrained=0.3) for rate, v in ((1e-2, 0.9), (1e-1, 0.3))]
    assert labels_of(*found) == ["finished", "collapsed"]


def test_the_state_of_all_other_runs_is_their_label_and_a_picture_shows_their_score() -> None:
    records = [record(rate=1e-3, validation=0.9, floor=0.1), record(rate=1e-2, validation=None, floor=0.1)]
    records += [record(rate=1e-1, validation=0.2, state="stopped"), record(rate=1.0, state="failed")]
    assert labels_of(*records) == ["finished", "diverged", "stopped", "failed"]
    *drawn, failed = analyze_curves(records).runs.sort_values("learning_rate")["drawn_score"]
    assert drawn == [0.9, 0.1, 0.2]
    assert math.isnan(failed)


def test_the_dry_runs_collapsed_runs_are_found() -> None:
    states = analyze_curves(study()).states
    assert set(states) == set(runs.LABELS)
    # By hand: 3 seeds of lora, rslora and pissa at 3e-2, two of lora_plus at 1e-2, two of hira at 3e-1.
    assert states["collapsed"] == 13


def test_the_final_one_of_two_records_of_a_configuration_counts() -> None:
    records = [record(validation=0.5, state=state) for state in ("failed", "finished", "stopped")]
    for order in (records, records[::-1]):
        assert analyze_curves(order).states == dict.fromkeys(runs.LABELS, 0) | {"finished": 1}


def test_only_results_whose_mean_is_the_score_are_items() -> None:
    right, lengths = ItemResults((1.0, 0.0, 1.0, 0.0)), ItemResults((3.0, -2.0))
    one = replace(record(validation=0.5), items={"validation": right, "test": lengths})
    (row,) = analyze_curves([one]).runs.to_dict("records")
    assert (row["validation_items"], row["test_items"]) == (4, 0)
    assert runs.item_results(one, "validation") is not None
    for other in (replace(one, items={"validation": ItemResults((1.0, 1.0))}), record()):
        assert runs.item_results(other, "validation") is None


# -- titles


def own(content: str, name: str, variant: str = "lora") -> Record:
    """Return the record of a run on a task in a user's file."""
    found = record(variant, task=name)
    configuration = replace(found.configuration, task=replace(found.configuration.task, content=content))
    return replace(found, configuration=configuration, fingerprint=configuration.fingerprint)


def test_a_task_of_the_user_is_shown_by_its_title_everywhere() -> None:
    records = [own("c" * 16, "old_name.py", variant) for variant in ("lora", "my_variant.py")]
    source = Source("c" * 16, "mail_task.py", "/home/me/mail_task.py", "mails by topic")
    mails = StudyFile("own", "Which?", "command --task /home/me/mail_task.py", sources=(source,))
    found, text = analyze(mails, records), describe_study(mails, records).text
    assert list(found.panels["task"]) == ["mails by topic"]
    assert set(found.best["curve"]) == {"lora", "my_variant.py"}
    assert "mails by topic on letters-base" in text
    assert "old_name.py" not in text + json.dumps(found.to_json())


def test_two_tasks_with_one_title_stay_two() -> None:
    records = [own("a" * 16, "one.py"), own("b" * 16, "two.py"), record(), own("d" * 16, "d.py")]
    sources = [Source("a" * 16, "one.py", title="mails"), Source("b" * 16, "two.py", title="mails")]
    sources.append(Source("d" * 16, "d.py", title="letters"))
    found = analyze(StudyFile("own", "", "x", sources=tuple(sources)), records)
    assert set(found.panels["task"]) == {"mails (one.py)", "mails (two.py)", "letters", "letters (d.py)"}
    assert set(found.runs["fingerprint"]) == {each.fingerprint for each in records}


# -- panels and curves


def test_other_differences_than_rate_seed_and_variant_make_panels() -> None:
    records = [record(rate=r, rank=k, steps=n) for r in (1e-3, 1e-2) for k in (8, 16) for n in (60, 80)]
    found = analyze_curves(records)
    settings = [f"rank={k}, steps_horizon={n}" for k in (16, 8) for n in (60, 80)]
    assert list(found.panels["panel"]) == [f"letters on letters-base ({each})" for each in settings]
    assert list(found.best["panel"]) == list(found.panels["panel"])
    assert (found.points.groupby("panel").size() == 2).all()


def test_alpha_and_a_variants_own_hyperparameters_make_curves_in_the_panel_of_lora() -> None:
    records = [record(), record("lora-plus", extra={"ratio": 4}), record("lora-plus", extra={"ratio": 16})]
    found = analyze_curves([*records, record("hira", alpha=None), record("dense", rank=192)])
    assert len(found.panels) == 1
    for frame in (found.best, found.points):
        labels = ["dense", "hira", "lora", "lora-plus ratio=16", "lora-plus ratio=4"]
        assert sorted(frame["curve"]) == labels
    alphas = analyze_curves([record(alpha=16.0), record(alpha=32.5)]).best
    assert set(alphas["curve"]) == {"lora alpha=16", "lora alpha=32.5"}


def test_mixed_provenance_gives_one_warning_per_column() -> None:
    versions = {"torch": "2.12.0", "ray": "2.60.0"}
    commit, device = "fedcba9" + "0" * 33 + "-dirty", "NVIDIA H100 80GB HBM3"
    other = Provenance(commit, versions, device=device, kernels="liger", lane_group_size=4, host="b")
    found = analyze_curves([record(seed=0), record(seed=1, provenance=other)])
    mixed = [w for w in found.warnings if "mix" in w]
    assert [w.split()[3].rstrip(":") for w in mixed] == ["commit", "device", "kernels", "torch"]
    assert "0123abc (1), fedcba900000-dirty (1)." in mixed[0]
    assert "NVIDIA H100 80GB HBM3 (1)" in mixed[1]
    assert found.to_json()["provenance"]["commit"] == {"0123abc": 1, commit: 1}
    failed = record(seed=1, validation=None, state="failed", provenance=other)
    assert not any("mix" in w for w in analyze_curves([record(seed=0), failed]).warnings)


# -- selection on the test set


@pytest.mark.parametrize(("select", "rate", "score"), [("validation", 1e-3, 0.5), ("published", 1e-2, 0.7)])
def test_the_split_that_chooses_is_the_one_that_is_asked_for(select: str, rate: float, score: float) -> None:
    """The validation scores are best at the lower rate, and the test scores at the higher rate."""
    scores = ((1e-3, 0.8, 0.5), (1e-2, 0.6, 0.7))
    records = [record("lora", r, seed, *pair) for r, *pair in scores for seed in range(2)]
    settings = AnalysisSettings(select=select)  # type: ignore[arg-type]
    found, is_published = analyze(replace(PUBLISHED, settings=settings), records), select == "published"
    assert list(found.best["learning_rate"]) == [rate]
    assert list(found.best["test_score"]) == pytest.approx([score])
    mark = "Selected on the test set, as published (--select published)."
    assert found.panels["panel"].iloc[0].endswith(runs.ON_TEST) == is_published
    assert any(w.startswith(mark) for w in found.warnings[:1]) == is_published
    assert list(found.verdicts["design"].str.endswith(mark)) == [is_published] * len(found.verdicts)
    assert len(found.verdicts)
    assert list(found.best_lanes["learning_rate"]) == [1e-3], "export chooses by validation"


def evaluated(*scores: float) -> Record:
    """Return the record of a run that was scored on the test split at every evaluation."""
    one = record(task="glue_rte")
    metric, own = one.configuration.task.metric, replace(one.configuration, test_evaluations="every")
    tests = [Evaluation(10 * (i + 1), "test", {metric: score, "loss": 1.0}) for i, score in enumerate(scores)]
    validations = [replace(e, split="validation", scores={metric: 0.1}) for e in tests]
    evaluations = (*validations, *tests)
    return replace(one, fingerprint=own.fingerprint, configuration=own, evaluations=evaluations)


def test_the_best_evaluation_of_a_run_counts_where_all_scored_the_test_split() -> None:
    chosen = runs.select_on_test(evaluated(0.2, 0.9, math.nan, 0.4))
    assert chosen.configuration.fingerprint == chosen.fingerprint, "the mark is no part of the identity"
    assert (chosen.score("validation"), chosen.score("test")) == (0.9, 0.9)
    assert evaluated(0.2, 0.9, 0.4).score("test") == 0.4, "without it the last one counts"
    assert "of the best evaluation of a run" in analyze(PUBLISHED, [evaluated(0.5)]).warnings[0]


def test_states_without_a_test_score_stay_as_they_are_on_the_test_set() -> None:
    diverged = runs.select_on_test(record(validation=None, floor=0.1))
    assert (diverged.score("validation"), diverged.score("test")) == (0.1, 0.1)
    assert runs.select_on_test(record(validation=None, state="failed")).score("validation") is None
