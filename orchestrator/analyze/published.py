"""The published scores of the survey (arXiv 2601.22708), as the frames and sections that every report has.

`orchestrator/published/scores.csv` has 660 scores: twenty variants on four tasks, at each learning rate of
the task's grid, with one seed each. Scores are in points, from 0 to 100; a higher score is better. No
statistical test of a user's study uses these scores: a score from one seed has no interval, and the survey
chose the learning rates by the reported test scores.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import formatting, render, report, sections
from orchestrator.analyze.analysis import load
from orchestrator.analyze.render import Section
from orchestrator.analyze.results import Results, frame_rows
from orchestrator.analyze.sections import figure, text
from orchestrator.analyze.verdicts import Verdict
from orchestrator.record.study_file import STUDY_FILE, StudyFile
from orchestrator.study.config import SHIPPED_FOLDER
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.graceful_interrupts import PROGRAM

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "arXiv 2601.22708"
REFERENCE = "LoRA"
"""The published name of the variant with which the other variants are compared."""
TASKS = {
    "gsm8k": ("gsm8k", "published-gsm8k-r8", "GSM8K", "Llama-3.1-8B on MetaMathQA, accuracy on GSM8K"),
    "humaneval": (
        "humaneval",
        "published-humaneval",
        "HumanEval",
        "Llama-3.1-8B on CodeFeedback, pass@1 on HumanEval",
    ),
    "glue": (
        "glue_average",
        "published-glue",
        "GLUE",
        "RoBERTa-base on the nine GLUE tasks, average of their metrics",
    ),
    "images": (
        "image_average",
        "published-images",
        "Images",
        "CLIP ViT-B/16 on seven image tasks, average accuracy",
    ),
}
"""Name on the command line -> (name in scores.csv, --config with the same protocol, title, description)."""
SEED_NOISE = {
    0.48: "pooled over five variants with three seeds each, GSM8K, in arXiv 2602.04998",
    1.0: "one configuration of PEFT's method comparison moved by 1.9 points when it was run again",
}
"""Assumed standard deviation of a score over seeds, in points -> its source. The sources measured other
models."""
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


def read_points(task: str) -> pd.DataFrame:
    """Return the published scores of a task as points, with the columns of `Results.points`.

    Args:
        task: One of `TASKS`.

    Raises:
        UsageError: The task has no published scores.
    """
    import pandas as pd

    if task not in TASKS:
        raise UsageError(f"--task {task!r}: no published scores. {suggest_nearest(task, TASKS)}")
    name, _, title, _ = TASKS[task]
    scores = pd.read_csv(SHIPPED_FOLDER / "scores.csv")
    scores = scores[scores["task"] == name]
    points = scores[["variant", "learning_rate"]].assign(
        panel=title,
        task=task,
        curve=scores["variant"],
        group=scores["variant"],
        source="published",
        floor=0.0,
    )
    points["point"] = points["curve"] + " " + points["learning_rate"].astype(str)
    for column in ("validation_score", "test_score"):
        points[[column, f"{column}_low", f"{column}_high"]] = math.nan
        points[column] = scores["score"]
    top = points.groupby("curve")["test_score"].transform("max")
    points = points.assign(
        seeds=1, usable=1, scored=1, collapsed=0, diverged=0, stopped=0, failed=0, eligible=True
    )
    points["is_best"] = (points["test_score"] == top) & ~points.assign(
        top=points["test_score"] == top
    ).duplicated(["curve", "top"])
    return points.sort_values(["curve", "learning_rate"], ignore_index=True)


def best_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return the best point of each variant of one task, with the columns of `Results.best`, the best first.

    Returns:
        One row for each variant. Besides the columns of `Results.best`, it has these columns:

        - rank: 1 plus the number of variants with a higher best score.
        - tied: the other variants with the same best score.
        - range: the variant's best score minus its worst score, in points.
        - lost: the variant's best score minus its score at LoRA's best rate, in points.
    """
    import pandas as pd

    table = points.pivot(index="curve", columns="learning_rate", values="test_score")
    top = table.max(axis=1)
    is_best = table.eq(top, axis=0)
    reference_rate = float(is_best.loc[REFERENCE].idxmax())
    rows = []
    for curve, own in table.iterrows():
        rates = [float(rate) for rate in own.index[is_best.loc[curve]]]
        rows.append({
            "panel": points["panel"].iloc[0],
            "task": points["task"].iloc[0],
            "variant": curve,
            "curve": curve,
            "group": curve,
            "point": f"{curve} {rates[0]}",
            "learning_rate": rates[0],
            "rates": formatting.rates(rates),
            "test_score": float(top[curve]),
            "validation_score": float(top[curve]),
            **{f"{name}_score_{end}": math.nan for name in ("test", "validation") for end in ("low", "high")},
            "rank": int((top > top[curve]).sum()) + 1,
            "tied": [str(name) for name in top.index[top == top[curve]] if name != curve],
            "bracket": _edges_of(rates, table.columns[0], table.columns[-1]),
            "range": round(float(own.max() - own.min()), 2),
            "lost": round(float(top[curve] - own[reference_rate]), 2),
            "test_at_common_rate": float(own[reference_rate]),
            "cliff": math.nan,
            "nothing_learned": False,
            "seeds": 1,
            "usable": 1,
            "ended": 1,
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values(["rank", "curve"], ignore_index=True)


def _edges_of(rates: Sequence[float], first: float, last: float) -> str:
    """Return the column `bracket` of a variant with these best rates, on a grid from `first` to `last`."""
    names = {(first,): "low edge", (last,): "high edge", (first, last): "both edges"}
    return names.get(tuple(rates), "yes")


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

    variants = list(dict.fromkeys(points["curve"]))
    table = points.pivot(index="curve", columns="learning_rate", values="test_score").loc[
        _file_order(variants)
    ]
    random = np.random.default_rng(0)
    scores = table.to_numpy(float)
    best = (scores + random.normal(0, noise, (DRAWS, *scores.shape))).max(axis=2)
    row = list(table.index).index(REFERENCE)
    ranks = 1 + (best > best[:, [row]]).sum(axis=1)
    low, high = np.quantile(ranks, (0.05, 0.95), method="inverted_cdf")
    equal = np.sort(random.normal(0, noise, (DRAWS, len(variants))), axis=1)
    spans, half = equal[:, -1] - equal[:, 0], equal[:, -1] - equal[:, -(len(variants) // 2)]
    return {
        "panel": points["panel"].iloc[0],
        "task": points["task"].iloc[0],
        "noise": noise,
        "low": int(low),
        "high": int(high),
        "equal_span": float(spans.mean()),
        "equal_span_high": float(np.quantile(spans, 0.95)),
        "equal_half_span": float(half.mean()),
        "equal_half_span_high": float(np.quantile(half, 0.95)),
    }


def _file_order(variants: Sequence[str]) -> list[str]:
    """Return the variants in the order of scores.csv, in which the simulation draws its random numbers."""
    import pandas as pd

    order = list(dict.fromkeys(pd.read_csv(SHIPPED_FOLDER / "scores.csv")["variant"]))
    return sorted(variants, key=order.index)


class Survey:
    """The published scores of some tasks as the frames of `Results`, with the curves of a user's study.

    Attributes:
        results: The frames panels, points, best and winners.
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
        points = {name: read_points(name) for name in names}
        best = {name: best_points(own) for name, own in points.items()}
        self.noise = pd.DataFrame([simulate_noise(points[n], each) for n in names for each in noise])
        self.overlays = [text for _, text in overlays.values()]
        shown = [pd.concat([points[n], *(overlays[n][0] for _ in (0,) if n in overlays)]) for n in names]
        command = f"{PROGRAM} published --task {' '.join(names)}"
        study = StudyFile(
            "published", f"What do the published scores of {SOURCE} say by themselves?", command
        )
        self.results = Results(
            study=study,
            records=(),
            runs=pd.DataFrame(
                columns=["panel", "curve", "group", "label", "fingerprint", "drawn_score", "seed"]
            ),
            points=pd.concat(shown, ignore_index=True),
            best=pd.concat(best.values(), ignore_index=True),
            panels=pd.DataFrame([_panel(points[n], best[n]) for n in names]),
            winners=pd.concat([_winners(points[n]) for n in names], ignore_index=True),
        )

    def rows(self, task: str) -> pd.DataFrame:
        """Return the rows of `best` of one task."""
        best = self.results.best
        return best[best["task"] == task]


def _panel(points: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    task = points["task"].iloc[0]
    scores, half = best["test_score"], best["test_score"].nlargest(len(best) // 2)
    _, config, title, description = TASKS[task]
    return {
        "panel": title,
        "task": task,
        "model": "",
        "description": description,
        "config": config,
        "metric": "points",
        "floor": 0.0,
        "untrained_validation": math.nan,
        "untrained_test": math.nan,
        "reference": REFERENCE,
        "common_rate": float(best.loc[best["curve"] == REFERENCE, "learning_rate"].iloc[0]),
        "common_label": "LoRA's best rate",
        "axis": "score in points",
        "span": round(float(scores.max() - scores.min()), 2),
        "half_span": round(float(half.max() - half.min()), 2),
    }


def _winners(points: pd.DataFrame) -> pd.DataFrame:
    """Return the best variants at each learning rate, and the span of all scores at this rate."""
    import pandas as pd

    rows = [
        {
            "panel": own["panel"].iloc[0],
            "task": own["task"].iloc[0],
            "learning_rate": rate,
            "winner": [str(n) for n in own.loc[own["test_score"] == own["test_score"].max(), "curve"]],
            "score": float(own["test_score"].max()),
            "span": round(float(own["test_score"].max() - own["test_score"].min()), 2),
        }
        for rate, own in points.groupby("learning_rate")
    ]
    return pd.DataFrame(rows)


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
    """Return the points of the user's curves, with the columns of `read_points`."""
    titles = published_variants()
    means = known.groupby(["variant", "learning_rate"])["test_score"].agg(["mean", "size"])
    needed = known.groupby("variant")["task"].nunique()
    whole = means[
        means["size"] == needed.reindex(means.index.get_level_values("variant")).to_numpy()
    ].reset_index()
    template = read_points(survey).iloc[[0] * len(whole)].reset_index(drop=True)
    curve = whole["variant"].map(titles)
    scores = 100 * whole["mean"]
    return template.assign(
        variant=curve,
        curve=curve,
        group=curve,
        learning_rate=whole["learning_rate"],
        source=name,
        test_score=scores,
        validation_score=scores,
        is_best=False,
    )


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
    panels = survey.results.panels.to_dict("records")
    points = survey.results.points[survey.results.points["source"] == "published"]
    rates = points.groupby("panel", sort=False)["learning_rate"].nunique()
    grids = ", ".join(f"{panel} {count} rates" for panel, count in rates.items())
    design = (
        f"{SOURCE}: {points['curve'].nunique()} variants, {grids}; {len(points)} scores, one seed each, "
        "rates chosen on the test set."
    )
    again = f"{PROGRAM} tuned --config {panels[0]['config']}"
    first, last = "Replicated tuning of the same protocol:", "This varies the rate and the others alike:"
    texts = (
        ("Tuned LoRA matches or beats most variants.", _ranks(survey, panels), first, again),
        ("At one fixed learning rate the winner depends on the rate.", _rate_winners(survey, panels), "", ""),
        ("The tuned variants differ by more than noise.", _spans(survey, panels), "", ""),
        ("The grid contains every optimum.", _edges(survey, panels), "", ""),
        (
            "The learning rate matters more than other hyperparameters.",
            _ranges(survey, panels),
            last,
            f"{PROGRAM} sensitivity",
        ),
    )
    return [Verdict(claim, "descriptive", text, design, *more) for claim, text, *more in texts]


def _of_panels(panels: Sequence[sections.Row], text: Callable[[sections.Row], str]) -> str:
    """Return a list of texts as one text, each followed by the title of its panel."""
    return formatting.join([f"{text(panel)} on {panel['panel']}" for panel in panels])


def _ranks(survey: Survey, panels: Sequence[sections.Row]) -> str:
    def place(panel: sections.Row) -> str:
        rows = survey.rows(panel["task"])
        own = rows[rows["curve"] == REFERENCE].iloc[0]
        return f"{own['rank']}{' (tied with ' + formatting.join(own['tied']) + ')' if own['tied'] else ''}"

    count = len(survey.rows(panels[0]["task"]))
    text = f"With every variant at its best rate, {REFERENCE} has of {count} variants the place "
    text += f"{_of_panels(panels, place)}. Nine of ten repeats with other seeds would give it the places "
    noise = survey.noise[survey.noise["task"].isin([panel["task"] for panel in panels])]
    repeats = [
        f"{formatting.join([f'{row.low} to {row.high}' for row in own.itertuples()])} at {_points(size)}"
        for size, own in noise.groupby("noise")
    ]
    return (
        f"{text}{'; '.join(repeats)} of noise (one standard deviation, assumed): ranks of equals are noise."
    )


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"


def _rate_winners(survey: Survey, panels: Sequence[sections.Row]) -> str:
    winners = survey.results.winners

    def number(panel: sections.Row) -> str:
        own = winners.loc[winners["task"] == panel["task"], "winner"]
        return f"{len({name for names in own for name in names})} variants"

    lost = survey.results.best.loc[survey.results.best["curve"] != REFERENCE, "lost"]
    return (
        f"Over the grid of rates the best variant is one of {_of_panels(panels, number)}. Trained at "
        f"{REFERENCE}'s best rate instead of its own, a variant loses {lost.median():.1f} points in the "
        f"median and up to {lost.max():.1f}."
    )


def _span(panel: sections.Row) -> str:
    return f"{panel['span']:.2f}"


def _spans(survey: Survey, panels: Sequence[sections.Row]) -> str:
    text = f"The best scores span, in points, {_of_panels(panels, _span)}; those of the "
    halves = [f"{panel['half_span']:.2f}" for panel in panels]
    text += f"better half {formatting.join(halves)}."
    for noise, own in survey.noise.groupby("noise"):
        row = own.iloc[0]  # the simulated spans depend on the noise and on the number of variants alone
        wide = [panel["panel"] for panel in panels if panel["span"] > row["equal_span_high"]]
        half = [panel["panel"] for panel in panels if panel["half_span"] > row["equal_half_span_high"]]
        source = f" ({SEED_NOISE[noise]})" if noise in SEED_NOISE else ""
        text += (
            f" With {_points(noise)} of noise{source} equal variants span {row['equal_span']:.1f} points, in "
            f"one of twenty studies more than {row['equal_span_high']:.1f}, and their better half "
            f"{row['equal_half_span']:.1f} and {row['equal_half_span_high']:.1f}. By this, all variants "
            f"differ by more than noise on {formatting.join(wide) or 'no task'}, and the better half on "
            f"{formatting.join(half) or 'no task'}."
        )
    return text


def _edges(survey: Survey, panels: Sequence[sections.Row]) -> str:
    best = survey.results.best
    edges = best[best["bracket"] != "yes"].groupby("panel")["curve"].agg(", ".join)
    if not len(edges):
        return "Every variant is best inside the grid."
    parts = [f"{panel['panel']}: {edges[panel['panel']]}" for panel in panels if panel["panel"] in edges]
    return f"Best at an end of the grid, so perhaps better beyond it, are {'; '.join(parts)}."


def _ranges(survey: Survey, panels: Sequence[sections.Row]) -> str:
    def gained(panel: sections.Row) -> str:
        return f"{survey.rows(panel['task'])['range'].median():.0f}"

    return (
        f"From its worst to its best rate a variant gains, in points, {_of_panels(panels, gained)} (median "
        "over variants). The paper shows other hyperparameters at one fixed rate as lines without numbers, "
        "so these scores cannot compare them."
    )


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
