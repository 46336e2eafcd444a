"""Labels of runs: a run that finished without a useful result is collapsed."""

from __future__ import annotations

from synthetic import record, study

from orchestrator.analyze.run_labels import LABELS, base_score, label_runs


def labels_of(*records, **more):
    found = label_runs(records, **more)
    return [found[r.fingerprint] for r in records]


def test_runs_above_the_best_rate_that_end_at_the_base_are_collapsed() -> None:
    low, best, above = (
        record(rate=rate, validation=v) for rate, v in ((1e-3, 0.0), (1e-2, 0.9), (1e-1, 0.0))
    )
    assert labels_of(low, best, above) == ["finished", "finished", "collapsed"]


def test_a_seed_that_falls_to_the_base_at_the_best_rate_is_collapsed() -> None:
    seeds = [record(seed=seed, validation=v) for seed, v in enumerate((0.9, 0.8, 0.0))]
    assert labels_of(*seeds) == ["finished", "finished", "collapsed"]


def test_the_base_is_the_untrained_model_or_a_constant_answer_whichever_is_higher() -> None:
    assert base_score(record(floor=0.2, untrained=0.1)) == 0.2
    assert base_score(record(floor=0.0, untrained=0.1)) == 0.1
    best, above = (
        record(rate=1e-2, validation=0.9, untrained=0.3),
        record(rate=1e-1, validation=0.3, untrained=0.3),
    )
    assert labels_of(best, above) == ["finished", "collapsed"]


def test_a_curve_that_is_never_better_than_the_base_has_no_collapsed_runs() -> None:
    runs = [record(rate=rate, validation=0.0) for rate in (1e-3, 1e-2)]
    assert labels_of(*runs) == ["finished", "finished"]


def test_curves_of_other_hyperparameters_are_apart() -> None:
    good = record(rate=1e-2, validation=0.9)
    other = record(rate=1e-1, validation=0.0, rank=4)
    assert labels_of(good, other) == ["finished", "finished"]


def test_the_state_of_all_other_runs_is_their_label() -> None:
    best = record(rate=1e-3, validation=0.9)
    others = [record(rate=1e-2, seed=seed, state=state) for seed, state in enumerate(("stopped", "failed"))]
    diverged = record(rate=1e-2, validation=None, seed=2)
    assert labels_of(best, *others, diverged) == ["finished", "stopped", "failed", "diverged"]


def test_the_dry_runs_collapsed_runs_are_found() -> None:
    found = label_runs(study())
    assert set(found.values()) <= set(LABELS)
    # By hand: 3 seeds of lora, rslora and pissa at 3e-2, two of lora_plus at 1e-2, two of hira at 3e-1.
    assert sum(label == "collapsed" for label in found.values()) == 13
