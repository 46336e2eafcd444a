"""The published scores give the tables of the survey. The report on them, and a user's study beside them."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from orchestrator.experiments.published import Published
from synthetic import record

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.chart_style import WIDE, specification
from orchestrator.analyze.published import (
    REFERENCE,
    TASKS,
    Survey,
    read_task,
    show_published,
    simulate_noise,
    survey_sections,
    survey_verdicts,
)
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.config import SHIPPED_FOLDER
from orchestrator.util.errors import UsageError


@pytest.fixture(scope="module")
def survey() -> Survey:
    return Survey(list(TASKS), (0.48, 1.0))


def test_there_are_660_scores_of_twenty_variants_and_one_seed_tests_nothing(survey: Survey) -> None:
    points = survey.results.points.groupby("task")
    assert set(points["curve"].nunique()) == {20}
    sizes = {"gsm8k": 20 * 8, "humaneval": 20 * 8, "glue": 20 * 7, "images": 20 * 10}
    assert points.size().to_dict() == sizes
    assert np.isfinite(survey.results.points["test_score"]).all()
    assert all((SHIPPED_FOLDER / f"{config}.yaml").exists() for config in survey.results.panels["config"])
    with pytest.raises(UsageError, match="no published scores"):
        read_task("gsm7k")
    found = survey_verdicts(survey)
    assert {each.outcome for each in found} == {"descriptive"}
    assert found[0].next_command == "lora-orchestrator tuned --config published-gsm8k-r8"
    assert "660 scores, one seed each" in found[0].design


KNOWN = {
    "gsm8k": ((3, [], 5.76, 1.29), (1, 10)),
    "humaneval": ((3, [], 5.25, 2.89), (2, 11)),
    "glue": ((7, [], 5.55, 2.08), (2, 15)),
    "images": ((5, ["RaSA"], 3.51, 0.61), (1, 16)),
}
"""Task -> the values of LoRA and of the panel, and LoRA's ranks with noise.

The first tuple has LoRA's rank, the variants with the same rank, and the spans of the best scores of all
variants and of the better ten. The second tuple has the 5 % and the 95 % quantile of LoRA's rank with one
point of noise.
"""


@pytest.mark.parametrize("task", KNOWN)
def test_lora_ranks_and_the_best_scores_span_as_published(task: str, survey: Survey) -> None:
    lora = survey.rows(task).set_index("curve").loc[REFERENCE]
    panel = survey.results.panels.set_index("task").loc[task]
    (noise,) = survey.noise[(survey.noise["task"] == task) & (survey.noise["noise"] == 1.0)].itertuples()
    repeats = noise.low, noise.high
    assert ((lora["rank"], lora["tied"], panel["span"], panel["half_span"]), repeats) == KNOWN[task]
    answer = survey_verdicts(survey)[0].answer
    shown = f"{lora['rank']} (tied with {lora['tied'][0]})" if lora["tied"] else f"{lora['rank']}"
    assert f"{shown} on {panel['panel']}" in answer
    assert "{} to {}".format(*repeats) in answer


BEST_RATES = {
    "LoRA": (5e-4, 5e-4, 1e-4, 5e-4),
    "LoRA+": (1e-4, 1e-5, 1e-5, 5e-5),
    "LoRA-GA": (5e-5, 1e-4, 1e-4, 5e-5),
    "PiSSA": (1e-4, 2e-4, 5e-5, 2e-4),
    "EVA": (5e-4, 5e-5, 5e-5, 1e-4),
    "HiRA": (1e-3, 1e-3, 1e-3, 5e-3),
    "LoRAMoE": (2e-5, 1e-5, 5e-5, 2e-5),
}


def test_best_rates(survey: Survey) -> None:
    rates = survey.results.best.pivot(index="curve", columns="task", values="learning_rate")[list(TASKS)]
    assert {variant: tuple(rates.loc[variant]) for variant in BEST_RATES} == BEST_RATES


def test_a_tie_of_two_rates_is_no_edge_and_the_edges_are_named(survey: Survey) -> None:
    """RaSA has the same score on HumanEval at 5e-4 and at the last rate of the grid."""
    rasa = survey.rows("humaneval").set_index("curve").loc["RaSA"]
    assert (rasa["rates"], rasa["bracket"]) == ("5e-4 = 1e-3", "yes")
    high = {"gsm8k": ["AdaLoRA", "DeLoRA", "DenseLoRA", "HiRA", "MoSLoRA", "RaSA"], "humaneval": ["HiRA"]}
    high |= {"glue": [], "images": ["AdaLoRA", "DeLoRA", "HiRA"]}
    edges = {task: survey.rows(task).query("bracket != 'yes'") for task in TASKS}
    assert {task: sorted(own["curve"]) for task, own in edges.items()} == high
    assert {side for own in edges.values() for side in own["bracket"]} == {"high edge"}
    assert "HumanEval: HiRA;" in survey_verdicts(survey)[3].answer


@pytest.mark.parametrize("task", TASKS)
def test_each_rate_has_its_winner_and_the_span_of_all_scores(task: str, survey: Survey) -> None:
    table = read_task(task)[0].pivot(index="curve", columns="learning_rate", values="test_score")
    winners = survey.results.winners.query("task == @task").set_index("learning_rate")
    assert winners.index.tolist() == list(table.columns)
    assert winners["score"].tolist() == table.max().tolist()
    assert winners["span"].tolist() == pytest.approx((table.max() - table.min()).tolist(), abs=0.005)
    assert all(
        set(winners.loc[r, "winner"]) == set(table.index[own == own.max()]) for r, own in table.items()
    )


def test_twenty_equal_variants_span_what_normal_order_statistics_say(survey: Survey) -> None:
    """The range of twenty standard normal values has mean 3.735 (Tippett 1925) and 95 % quantile 5.01."""
    for noise in survey.noise[survey.noise["noise"] == 1.0].itertuples():
        assert noise.equal_span == pytest.approx(3.735, abs=0.02)
        assert noise.equal_span_high == pytest.approx(5.01, abs=0.04)
    doubled = simulate_noise(read_task("gsm8k")[0], 2.0)
    assert doubled["equal_span"] == pytest.approx(2 * 3.735, abs=0.04)


def test_the_loss_at_loras_best_rate_is_zero_for_lora_and_never_negative(survey: Survey) -> None:
    for task in TASKS:
        rows = survey.rows(task).set_index("curve")
        assert rows.loc[REFERENCE, "lost"] == 0
        assert rows["lost"].min() >= 0
        pissa = read_task(task)[0].query("curve == 'PiSSA'").set_index("learning_rate")["test_score"]
        expected = pissa.max() - pissa[rows.loc[REFERENCE, "learning_rate"]]
        assert rows.loc["PiSSA", "lost"] == pytest.approx(expected)
        assert rows.loc["PiSSA", "range"] == pytest.approx(pissa.max() - pissa.min())


# -- an own study beside the published one


def own_records(task: str = "metamathqa") -> list[Record]:
    curve = {1e-4: (0.2, 0.3), 1e-3: (0.4, 0.5)}
    return [
        record(variant, rate, seed, 0.5, test, task=task, model="small-base")
        for variant in ("lora", "lora_plus", "rslora", "vera")
        for rate, tests in curve.items()
        for seed, test in enumerate(tests)
    ]


def beside(records: list[Record]) -> Survey:
    return Survey((), (1.0,), analyze(StudyFile("mine", "?", "command"), records))


def test_an_own_study_is_drawn_by_published_name_in_points() -> None:
    found = beside(own_records())
    assert found.results.panels["task"].tolist() == ["gsm8k"], "the task of the user's study alone"
    own = found.results.points[found.results.points["source"] == "mine"]
    assert set(own["curve"]) == {"LoRA", "RsLoRA", "LoRA+"}
    lora = own[own["variant"] == "LoRA"].sort_values("learning_rate")
    assert lora["learning_rate"].tolist() == [1e-4, 1e-3]
    assert lora["test_score"].tolist() == pytest.approx([25.0, 45.0])
    text = "mine: small-base on metamathqa, 2 seeds. Not published, so not drawn: vera."
    assert found.overlays == [text]
    assert len(found.rows("gsm8k")) == 20, "it enters no number of the survey"
    charts = {each.name: each.chart for each in survey_sections(found) if each.chart is not None}
    lines = json.dumps(specification(charts["curves"], WIDE)["datasets"])
    assert lines.count('"kind": "line", "dash": "second source"') == 4 * 2, "LoRA is in every small plot"


def test_a_study_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    StudyFile("published", "?", "command").write(tmp_path / "published")
    with pytest.raises(UsageError, match="the folder of a study of yours"):
        show_published(["gsm8k"], [1.0], tmp_path, tmp_path / "store")


def test_an_average_over_tasks_has_the_rates_at_which_each_task_has_a_score() -> None:
    """A diverged run counts with the floor as its score, and a failed run does not count."""
    dtd = [
        record("lora", 1e-3, 0, 0.5, 0.4, floor=0.02, task="dtd"),
        record("lora", 1e-3, 1, None, None, state="diverged", floor=0.02, task="dtd"),
        record("lora", 1e-3, 2, None, None, state="failed", floor=0.02, task="dtd"),
        record("lora", 1e-2, 0, 0.5, 0.4, floor=0.02, task="dtd"),
    ]
    for records, score in ((dtd[:3], 21.0), ([*dtd, record("lora", 1e-3, 0, 0.5, 0.61, task="cars")], 41.0)):
        found = beside(records)
        own = found.results.points[found.results.points["source"] == "mine"]
        assert own["task"].tolist() == ["images"]
        assert own["learning_rate"].tolist() == [1e-3]
        assert own["test_score"].tolist() == pytest.approx([score])
    assert "on cars, dtd, 3 seeds. The published average has 5 more tasks." in found.overlays[0]


def test_tasks_of_an_average_without_a_common_rate_have_no_curve() -> None:
    found = beside([record("lora", 1e-3, task="dtd"), record("lora", 1e-2, task="cars")])
    assert set(found.results.points["source"]) == {"published"}
    assert len(found.overlays) == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record()], "its tasks are letters; take a study of metamathqa"),
        (
            [record(task="metamathqa"), record(task="metamathqa", rank=4)],
            "2 configurations of lora on metamathqa that differ in more than rate and seed",
        ),
        ([record("vera", task="metamathqa")], "no variant of the published study"),
        ([record(task="metamathqa", state="failed")], "no variant of the published study"),
    ],
)
def test_a_study_that_cannot_be_drawn_is_refused_in_one_line(records: list[Record], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        beside(records)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan")])
def test_a_noise_that_is_none_is_refused(noise: float) -> None:
    with pytest.raises(UsageError, match="--noise"):
        Published(noise=(1.0, noise))


# -- the report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the report, with a user's study on GSM8K over the published curves."""
    output = tmp_path_factory.mktemp("published")
    store, records = Store(output / "store"), own_records()
    with pytest.raises(UsageError, match="mine"):
        show_published((), (), output, output / "store", "mine")
    for each in records:
        store.put(each)
    StudyFile("mine", "?", "command", tuple(r.fingerprint for r in records)).write(output / "mine")
    show_published(list(TASKS), (), output, output / "store", "mine")
    return output / "published"


def test_the_page_loads_nothing_and_shows_every_variant(page: Path) -> None:
    text = (page / "report.html").read_text()
    assert not re.search(r"""src=["'](?!data:)|@import|url\((?!#)|<link""", text)
    assert "default-src 'none'" in text, "the browser refuses everything that is not in the file"
    points = read_task("gsm8k")[0]
    shown = html.unescape(re.sub("<[^>]*>", " ", text))
    assert all(f"{score:.2f}" in shown for score in points.groupby("curve")["test_score"].max())
    assert all(variant in shown for variant in points["curve"])
    assert "mine: small-base on metamathqa" in shown


def test_summary_and_pictures_are_beside_the_page(page: Path) -> None:
    summary = json.loads((page / "summary.json").read_text())
    assert [panel["task"] for panel in summary["panels"]] == ["gsm8k"]
    lora = [p for p in summary["points"] if p["curve"] == "LoRA"]
    published = {p["learning_rate"]: p["test_score"] for p in lora if p["source"] == "published"}
    assert max(published.values()) == published[5e-4] == 75.51
    scores = [p["test_score"] for p in summary["points"] if p["source"] == "published"]
    assert sorted(scores) == sorted(read_task("gsm8k")[0]["test_score"])
    assert [(each["low"], each["high"]) for each in summary["noise"]] == [(1, 6), (1, 10)]
    assert {p["source"] for p in lora} == {"published", "mine"}
    for stem in ("curves", "heatmap"):
        assert (page / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (page / f"{stem}.svg").read_text()
