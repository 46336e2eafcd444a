"""The published scores of the survey (arXiv 2601.22708), as the frames and sections that every report has.

`orchestrator/published/scores.csv` has 660 scores: twenty variants on four tasks, at each learning rate of
the task's grid, with one seed each. Scores are in points, from 0 to 100; a higher score is better. No
statistical test of a user's study uses these scores: a score from one seed has no interval, and the survey
chose the learning rates by the reported test scores.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import curves, formatting, render, report, sections
from orchestrator.analyze.analysis import load
from orchestrator.analyze.render import Section
from orchestrator.analyze.results import Results, frame_rows
from orchestrator.analyze.sections import figure, text
from orchestrator.analyze.verdicts import Verdict
from orchestrator.record.study_file import STUDY_FILE, StudyFile
from orchestrator.study.config import SHIPPED_FOLDER
from orchestrator.util.command import PROGRAM
from orchestrator.util.errors import UsageError, suggest_nearest

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "arXiv 2601.22708"
REFERENCE = "LoRA"
"""The published name of the variant with which the other variants are compared."""
TASKS = {
    "gsm8k": ("published-gsm8k-r8", "GSM8K", "Llama-3.1-8B on MetaMathQA, accuracy on GSM8K"),
    "humaneval": ("published-humaneval", "HumanEval", "Llama-3.1-8B on CodeFeedback, pass@1 on HumanEval"),
    "glue": ("published-glue", "GLUE", "RoBERTa-base on the nine GLUE tasks, average of their metrics"),
    "images": ("published-images", "Images", "CLIP ViT-B/16 on seven image tasks, average accuracy"),
}
"""Name on the command line -> (--config with the same protocol, title, description)."""
_NAMES_IN_FILE = {"glue": "glue_average", "images": "image_average"}
"""Name of a task on the command line -> its name in scores.csv, if it has another one there."""
SEED_NOISE = {
    0.48: "pooled over five variants with three seeds each, GSM8K, in arXiv 2602.04998",
    1.0: "one configuration of PEFT's method comparison moved by 1.9 points when it was run again",
}
"""Assumed standard deviation of a score over seeds, in points -> its source, which measured other models."""
DRAWS = 20_000
"""The number of simulated repetitions of the study."""
IMAGE_TASKS = ("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
_OWN_TASKS = {"metamathqa": "gsm8k", "codefeedback": "humaneval", **dict.fromkeys(IMAGE_TASKS, "images")}
_TASKS_IN_AVERAGE = {"glue": 9, "images": len(IMAGE_TASKS)}


def published_variants() -> dict[str, str]:
    """Return the variants of the survey: name in this project -> published name."""
    variants = tomllib.loads((SHIPPED_FOLDER / "variants.toml").read_text())
    return {own: title for title, own in variants.items()}


def published_task(own_task: str) -> str | None:
    """Return the published task to which a task of this project belongs; None if it belongs to none."""
    return "glue" if own_task.startswith("glue_") else _OWN_TASKS.get(own_task)


def read_task(task: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the frames `points`, `best` and `panels` of a published task, see `Results`.

    Args:
        task: One of `TASKS`.

    Returns:
        The frames have these columns of the survey besides those of `Results`:

        - points: source ("published").
        - best: rank (1 plus the number of variants with a higher best score), tied (the other variants with
          the same best score) and range (the best score minus the worst score).
        - panels: description, config, span (the highest minus the lowest best score) and half_span (the same
          for the better half of the variants).

    Raises:
        UsageError: The task has no published scores.
    """
    import pandas as pd

    if task not in TASKS:
        raise UsageError(f"--task {task!r}: no published scores. {suggest_nearest(task, TASKS)}")
    config, _, description = TASKS[task]
    scores = pd.read_csv(SHIPPED_FOLDER / "scores.csv")
    runs = _as_runs(task, scores[scores["task"] == _NAMES_IN_FILE.get(task, task)])
    points = curves.make_points(runs)
    best, panels = curves.best_of_curves(runs, points, REFERENCE)
    # `curves` measures widths and cliffs by the score of a constant answer, which is unknown here, and on a
    # metric from 0 to 1.
    best = best.drop(columns=best.filter(regex="^(width|cliff)").columns)
    # A rate inside the grid with the same score makes an end of the grid no edge.
    is_tie = best["rates"].str.contains("=")
    best["bracket"] = best["bracket"].mask(is_tie & (best["bracket"] != "both edges"), "yes")
    best["lost"] = best["lost"].round(2)
    best["rank"] = best["test_score"].rank(method="min", ascending=False).astype(int)
    equals = best.groupby("rank")["curve"].agg(list)
    best["tied"] = [[name for name in equals[row.rank] if name != row.curve] for row in best.itertuples()]
    scores = points.groupby("curve")["test_score"]
    best["range"] = best["curve"].map(scores.max() - scores.min()).round(2)

    top, middle, last = best["test_score"].iloc[[0, len(best) // 2 - 1, -1]]
    panels = panels.assign(axis="score in points", description=description, config=config)
    panels["span"], panels["half_span"] = round(top - last, 2), round(top - middle, 2)
    return points.assign(source="published"), best, panels


def _as_runs(task: str, scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores of a published task as finished runs with one seed, for the functions of `curves`.

    Args:
        task: One of `TASKS`.
        scores: The columns variant (the published name), learning_rate and score (in points).
    """
    variant, rate = scores["variant"], scores["learning_rate"]
    return scores[["variant", "learning_rate"]].assign(
        **dict.fromkeys(("task", "task_title"), task),
        panel=TASKS[task][1],
        **dict.fromkeys(("curve", "group"), variant),
        point=variant + " " + rate.astype(str),
        metric="points",
        **dict.fromkeys(("validation_score", "test_score"), scores["score"]),
        **dict.fromkeys(("untrained_validation_score", "untrained_test_score"), math.nan),
        **dict.fromkeys(("state", "label"), "finished"),
        **dict.fromkeys(("model", "fingerprint", "started"), ""),
        **dict.fromkeys(("floor", "base_score"), 0.0),
        **dict.fromkeys(("seed", "validation_items", "test_items", "steps", "steps_horizon"), 0),
    )


def simulate_noise(points: pd.DataFrame, noise: float) -> dict[str, Any]:
    """Simulate `DRAWS` repetitions of the study with other training seeds. The result is deterministic.

    For LoRA's rank, independent normal noise is added to every score, and the best rate of each variant is
    chosen again. For the span of variants with equal true scores, one normal score is drawn for each variant.
    The highest of several scores varies less than one score, so spans of highest scores would be narrower.

    Args:
        points: The points of one task.
        noise: The standard deviation of the noise, in points.

    Returns:
        - low, high: the 5 % and the 95 % quantile of LoRA's rank.
        - equal_span, equal_span_high: the mean and the 95 % quantile of the span (highest minus lowest score)
          of all variants, if their true scores are equal.
        - equal_half_span, equal_half_span_high: the same for the better half of the variants.
    """
    import numpy as np

    variants = list(published_variants().values())  # their order decides which random numbers each one gets
    table = points.pivot(index="curve", columns="learning_rate", values="test_score").loc[variants]
    random = np.random.default_rng(0)
    best = (table.to_numpy(float) + random.normal(0, noise, (DRAWS, *table.shape))).max(axis=2)
    ranks = 1 + (best > best[:, [variants.index(REFERENCE)]]).sum(axis=1)
    low, high = np.quantile(ranks, (0.05, 0.95), method="inverted_cdf")
    equal = np.sort(random.normal(0, noise, (DRAWS, len(variants))), axis=1)
    spans, half = equal[:, -1] - equal[:, 0], equal[:, -1] - equal[:, -(len(variants) // 2)]
    return {
        **points[["panel", "task"]].iloc[0],
        "noise": noise,
        "low": int(low),
        "high": int(high),
        "equal_span": float(spans.mean()),
        "equal_span_high": float(np.quantile(spans, 0.95)),
        "equal_half_span": float(half.mean()),
        "equal_half_span_high": float(np.quantile(half, 0.95)),
    }


class Survey:
    """The published scores of some tasks as the frames of `Results`, with the curves of a user's study.

    Attributes:
        results: The frames panels, points, best and winners. There are no runs, which the charts would draw.
        noise: One row for each task and assumed noise, see `simulate_noise`.
        overlays: A sentence about the user's curves of each task.
    """

    def __init__(self, tasks: Sequence[str], noise: Sequence[float], own: Results | None = None) -> None:
        """Read and summarize the scores.

        Args:
            tasks: Names of published tasks; ignored if `own` is given.
            noise: Assumed standard deviations of a score over seeds, in points.
            own: The results of a user's study. The published tasks are those of this study, and its curves
                are added to the published curves.

        Raises:
            UsageError: A task is unknown, or the study cannot be drawn.
        """
        import pandas as pd

        overlays = _overlay(own) if own is not None else {}
        names = list(overlays) or list(dict.fromkeys(tasks))
        parts = zip(*map(read_task, names), strict=True)
        points, best, panels = (pd.concat(frames, ignore_index=True) for frames in parts)
        by_task = points.groupby("task", sort=False)
        self.noise = pd.DataFrame([simulate_noise(part, each) for _, part in by_task for each in noise])
        self.overlays = [text for _, text in overlays.values()]
        command = f"{PROGRAM} published --task {' '.join(names)}"
        question = f"What do the published scores of {SOURCE} say by themselves?"
        self.results = Results(
            study=StudyFile("published", question, command),
            records=(),
            runs=pd.DataFrame(columns=["panel", "curve", "group", "label", "fingerprint", "seed"]),
            points=pd.concat([points, *(drawn for drawn, _ in overlays.values())], ignore_index=True),
            best=best,
            panels=panels,
            winners=_winners(points),
        )

    def rows(self, task: str) -> pd.DataFrame:
        """Return the rows of `best` of one task."""
        best = self.results.best
        return best[best["task"] == task]


def _winners(points: pd.DataFrame) -> pd.DataFrame:
    """Return the best variants of each task and learning rate, and the span of all scores at this rate."""
    keys = ["panel", "task", "learning_rate"]
    scores = points.groupby(keys, sort=False)["test_score"]
    winners = scores.agg(score="max", span="min")
    winners["span"] = (winners["score"] - winners["span"]).round(2)
    is_best = points["test_score"] == scores.transform("max")
    winners["winner"] = points[is_best].groupby(keys)["curve"].agg(list)
    return winners.reset_index()


# -- an own study beside the published one


def _overlay(own: Results) -> dict[str, tuple[pd.DataFrame, str]]:
    """Return published task -> the curves of a user's study on it and a sentence about these curves.

    Several tasks of the study may belong to one published task. Each score is a mean over seeds and over
    these tasks, in points. A curve has the rates at which each of these tasks has a score.

    Raises:
        UsageError: The study has no published task, no test score of a published variant, or several curves
            of one variant and task.
    """
    titles, name = published_variants(), own.name
    points = own.points.assign(survey=own.points["task"].map(published_task))
    if points["survey"].isna().all():
        has = f"its tasks are {', '.join(sorted(points['task'].unique()))}"
        repeats = "metamathqa, codefeedback, glue_* or the seven image tasks"
        raise UsageError(f"--overlay {name!r}: {has}; take a study of {repeats}.")
    found = {}
    for survey in [task for task in TASKS if task in set(points["survey"])]:
        rows = points[points["survey"] == survey]
        known = rows[rows["variant"].isin(titles) & rows["test_score"].notna()]
        if known.empty:
            raise UsageError(
                f"--overlay {name!r}: no variant of the published study has a score on {survey} yet; finish "
                "the study first, or take another one."
            )
        groups = known["panel"] + known["group"]  # the curves of several panels have the same labels
        several = groups.groupby([known["variant"], known["task"]]).nunique()
        if (several > 1).any():
            variant, task = several.idxmax()
            raise UsageError(
                f"--overlay {name!r}: it has {several.max()} configurations of {variant} on {task} that "
                "differ in more than rate and seed; take a study with one."
            )
        found[survey] = _overlay_points(known, survey, name), _overlay_text(own, rows, survey)
    return found


def _overlay_points(known: pd.DataFrame, survey: str, name: str) -> pd.DataFrame:
    """Return the points of the user's curves, with the columns of the published points."""
    known = known.assign(variant=known["variant"].map(published_variants()), score=100 * known["test_score"])
    groups = known.groupby(["variant", "learning_rate"])["score"]
    scores = groups.agg(score="mean", tasks="size").reset_index()
    scores = scores[scores["tasks"] == scores["variant"].map(known.groupby("variant")["task"].nunique())]
    if scores.empty:
        return read_task(survey)[0].head(0)
    points = curves.make_points(_as_runs(survey, scores))
    return points.assign(source=name, is_best=False)


def _overlay_text(own: Results, rows: pd.DataFrame, survey: str) -> str:
    tasks, variants = sorted(rows["task"].unique()), sorted(set(rows["variant"]) - set(published_variants()))
    seeds = formatting.count(int(own.runs.loc[own.runs["task"].isin(tasks), "seed"].nunique()), "seed")
    text = f"{own.name}: {', '.join(sorted(rows['model'].unique()))} on {', '.join(tasks)}, {seeds}."
    if (missing := _TASKS_IN_AVERAGE.get(survey, 1) - len(tasks)) > 0:
        text += f" The published average has {formatting.count(missing, 'more task')}."
    return text + (f" Not published, so not drawn: {', '.join(variants)}." if variants else "")


# -- verdicts


def survey_verdicts(survey: Survey) -> list[Verdict]:
    """Return descriptive verdicts on the claims of the published study, from its own scores alone."""
    results, best = survey.results, survey.results.best
    points = results.points[results.points["source"] == "published"]
    rates = points.groupby("panel", sort=False)["learning_rate"].nunique()
    design = (
        f"{SOURCE}: {points['curve'].nunique()} variants; rates: {_of_panels(rates)}; {len(points)} scores, "
        "one seed each, rates chosen on the test set."
    )
    winners = results.winners.explode("winner").groupby("panel", sort=False)["winner"].nunique()
    lost = best.loc[best["curve"] != REFERENCE, "lost"]
    edges = best[best["bracket"] != "yes"].groupby("panel", sort=False)["curve"].agg(", ".join)
    ends = "; ".join(f"{panel}: {variants}" for panel, variants in edges.items())
    gained = best.groupby("panel", sort=False)["range"].median()
    describe = partial(Verdict, outcome="descriptive", design=design)
    return [
        describe(
            claim="Tuned LoRA matches or beats most variants.",
            answer=_ranks(survey, results.panels.to_dict("records")),
            next_step="Replicated tuning of the same protocol:",
            next_command=f"{PROGRAM} tuned --config {results.panels['config'].iloc[0]}",
        ),
        describe(
            claim="At one fixed learning rate the winner depends on the rate.",
            answer=f"The number of variants that are the best one at some rate is {_of_panels(winners)}. "
            f"Trained at {REFERENCE}'s best rate instead of its own, a variant loses {lost.median():.1f} "
            f"points in the median and up to {lost.max():.1f}.",
        ),
        describe(claim="The tuned variants differ by more than noise.", answer=_spans(survey)),
        describe(
            claim="The grid contains every optimum.",
            answer=f"Best at an end of the grid, so perhaps better beyond it, are {ends or 'no variants'}.",
        ),
        describe(
            claim="The learning rate matters more than other hyperparameters.",
            answer="From its worst to its best rate a variant gains, in points, "
            f"{_of_panels(gained, '.0f')} (median over variants). The paper shows other hyperparameters at "
            "one fixed rate as lines without numbers, so these scores cannot compare them.",
            next_step="This varies the rate and the others alike:",
            next_command=f"{PROGRAM} sensitivity",
        ),
    ]


def _of_panels(values: pd.Series, form: str = "") -> str:
    """Return values as text, each followed by its panel, such as "5.76 on GSM8K and 5.25 on HumanEval".

    Args:
        values: The values, indexed by panel.
        form: The format of a value.
    """
    return formatting.join([f"{value:{form}} on {panel}" for panel, value in values.items()])


def _ranks(survey: Survey, panels: Sequence[sections.Row]) -> str:
    tasks = [panel["task"] for panel in panels]
    best, noise = (frame[frame["task"].isin(tasks)] for frame in (survey.results.best, survey.noise))
    places = best[best["curve"] == REFERENCE].set_index("panel")
    ties = places["tied"].map(lambda tied: f" (tied with {formatting.join(tied)})" if tied else "")
    ranges = noise["low"].astype(str) + " to " + noise["high"].astype(str)
    repeats = [
        f"{formatting.join(list(own))} with {size:g}-point noise"
        for size, own in ranges.groupby(noise["noise"])
    ]
    return (
        f"With every variant at its best rate, {REFERENCE} has of {best['curve'].nunique()} variants the "
        f"place {_of_panels(places['rank'].astype(str) + ties)}. Nine of ten repeats with other seeds would "
        f"give it the places {'; '.join(repeats)} (one standard deviation, assumed): ranks of equals "
        "are noise."
    )


def _spans(survey: Survey) -> str:
    panels = survey.results.panels.set_index("panel")
    spans, halves = panels["span"], panels["half_span"]
    text = f"The best scores span, in points, {_of_panels(spans, '.2f')}; "
    text += f"those of the better half {_of_panels(halves, '.2f')}."
    for noise, own in survey.noise.groupby("noise"):
        row = own.iloc[0]  # the simulated spans depend on the noise and on the number of variants alone
        wide = formatting.join(spans.index[spans > row["equal_span_high"]]) or "no task"
        half = formatting.join(halves.index[halves > row["equal_half_span_high"]]) or "no task"
        source = f" ({SEED_NOISE[noise]})" if noise in SEED_NOISE else ""
        text += (
            f" With {noise:g}-point noise{source} equal variants span {row['equal_span']:.1f} points, in "
            f"one of twenty studies more than {row['equal_span_high']:.1f}, and their better half "
            f"{row['equal_half_span']:.1f} and {row['equal_half_span_high']:.1f}. By this, all variants "
            f"differ by more than noise on {wide}, and the better half on {half}."
        )
    return text


# -- the report


def survey_sections(survey: Survey) -> Iterator[Section]:
    """Yield the sections of the report on the published scores: tables, verdicts and charts."""
    found = survey_verdicts(survey)
    all_panels = sections.Report(survey.results)

    @sections.per_panel
    def glance(report: sections.Report) -> Iterator[Section]:
        panel = report.panel
        is_first = panel["panel"] == all_panels.panel["panel"]
        yield Section(
            "glance",
            "",
            f"{panel['description']}. {_ranks(survey, [panel])}",
            sections.make_table(
                report.results.best,
                text("variant", lambda r: r["curve"]),
                figure("rank", lambda r: f"{r['rank']}{'=' if r['tied'] else ''}"),
                figure("best score", lambda r: f"{r['test_score']:.2f}"),
                figure("best rate", sections.best_rate_text),
                figure(f"lost at {formatting.rate(panel['common_rate'])}", lambda r: f"{r['lost']:.2f}"),
                figure("range over rates", lambda r: f"{r['range']:.2f}"),
            ),
            note=f"Points of the score; one seed. Lost: trained at {REFERENCE}'s best rate. =: tied. edge: "
            "at an end of the grid, perhaps better beyond.",
            step=found[0].next_step if is_first else "",
            command=found[0].next_command if is_first else "",
        )

    @sections.per_panel
    def winners(report: sections.Report) -> Iterator[Section]:
        table = sections.make_table(
            report.results.winners,
            text("rate", lambda r: formatting.rate(r["learning_rate"])),
            text("best variant", lambda r: formatting.join(r["winner"])),
            figure("score", lambda r: f"{r['score']:.2f}"),
            figure("best minus worst", lambda r: f"{r['span']:.2f}"),
        )
        yield Section("winners", "The best variant at each rate", table=table)

    yield from glance(all_panels)
    yield from sections.verdict_cards(found, [found[0].next_step])
    for place, about in enumerate(survey.overlays, 1):
        yield Section(f"overlay-{place}", "An own study beside it (dashed)", about)
    yield from sections.curve_charts(all_panels)
    yield from winners(all_panels)


def show_published(
    tasks: Sequence[str], noise: Sequence[float], output: Path, store: Path, overlay: str | None = None
) -> None:
    """Print the report on the published scores and write its files to `<output>/published`.

    Args:
        tasks: Names of published tasks, see `TASKS`; ignored if `overlay` is given.
        noise: Assumed standard deviations of a score over seeds, in points.
        output: The output folder.
        store: The folder of the store.
        overlay: The name of a user's study in the output folder. Its curves are drawn over the published
            curves, and only its published tasks are shown.

    Raises:
        UsageError: A task is unknown, the study cannot be drawn, or the folder belongs to a study.
    """
    from rich.console import Console

    folder = output / "published"
    if (folder / STUDY_FILE).exists():
        raise UsageError(f"{folder}: it is the folder of a study of yours; take another --output.")
    own = load(overlay, output=output, store=store) if overlay else None
    survey = Survey(tasks, noise or tuple(SEED_NOISE), own)
    made, results = list(survey_sections(survey)), survey.results
    numbers = {
        "schema_version": report.SCHEMA_VERSION,
        "source": SOURCE,
        "verdicts": [asdict(verdict) for verdict in survey_verdicts(survey)],
        **{name: frame_rows(getattr(results, name)) for name in ("panels", "points", "best", "winners")},
        "noise": frame_rows(survey.noise),
    }
    title = f"The published scores of {SOURCE}"
    setup = "20 variants · one seed a score · rates chosen on the test set"
    page = render.to_html(title, results.study.question, setup, [], made)
    report.write_files(folder, page, numbers, made)
    console = Console(width=80, highlight=False)
    console.print(render.to_terminal(made))
    console.print(f"Report   {folder / 'report.html'}", markup=False, soft_wrap=True)
