"""The sections of a report.

A function makes one or more `Section`s from a `Report`. The tuple `SECTIONS` lists these functions in the
order in which the HTML page, the terminal and MLflow show the sections. To add a section, write a function
and add it to `SECTIONS`; with the decorator `per_panel` it makes the sections of one panel. If the section
has a chart, add a function to `charts`. `results.Results` explains the terms panel, curve and point.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.analyze import answers, charts, formatting, verdicts
from orchestrator.analyze.advice import next_step
from orchestrator.analyze.costs import loss_frame, time_use
from orchestrator.analyze.formatting import count, number, points, rate
from orchestrator.analyze.render import Column, Section, Table
from orchestrator.analyze.results import Results
from orchestrator.analyze.runs import count_provenance
from orchestrator.record.study_file import StudyKind, data_warnings
from orchestrator.study.names import store_command

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
"""A row of a frame: column -> value."""


@dataclass(frozen=True)
class Report:
    """The results of a study, and the places of its files, which the commands in the report name."""

    results: Results
    tracking_uri: str = ""
    """MLflow's tracking URI of the runs, without user name and password."""
    output: Path | None = None
    """The output folder, which contains the study's folder. None stands for the default folder."""
    store: Path | None = None
    """The folder of the records. None stands for the store in the output folder."""

    @property
    def kind(self) -> StudyKind:
        """The kind of the analysis."""
        return self.results.study.settings.kind

    @cached_property
    def next_step(self) -> tuple[str, str]:
        """What to do next: a sentence and a command."""
        return next_step(self.results, self.output, self.store)

    @property
    def panel(self) -> dict[str, Any]:
        """The row of the first panel in `Results.panels`: column -> value.

        A function with the decorator `per_panel` gets a report of a single panel.
        """
        row: dict[str, Any] = self.results.panels.iloc[0].to_dict()
        return row

    @cached_property
    def panels(self) -> list[Report]:
        """A report of each panel alone."""
        return [replace(self, results=self.results.of_panel(panel)) for panel in self.results.panels["panel"]]


MakeSections = Callable[[Report], Iterable[Section]]


def per_panel(make: MakeSections) -> MakeSections:
    """Decorate a function that makes the sections of one panel, so that it makes those of all panels.

    If the study has several panels, the decorator adds the panel to the title of each section. It also adds
    a suffix to the names of all sections but those of the first panel, for example "-2" for the second panel.
    A section without a title gets the panel as its title.
    """

    @wraps(make)
    def make_all(report: Report) -> Iterator[Section]:
        for place, part in enumerate(report.panels, 1):
            panel = part.panel["panel"]
            for section in make(part):
                title = (
                    f"{section.title}: {panel}" if section.title and len(report.panels) > 1 else section.title
                )
                name = f"{section.name}-{place}" if place > 1 else section.name
                yield replace(section, name=name, title=title or panel)

    return make_all


Cell = tuple[Column, Callable[[Row], str]]
"""A column of a table, and a function that returns the text of its cell for a row of a frame."""


def text(header: str, cell: Callable[[Row], str], more: bool = False) -> Cell:
    """Return a column of texts. `Column.more` explains `more`."""
    return Column(header, "text", more), cell


def figure(header: str, cell: Callable[[Row], str], more: bool = False) -> Cell:
    """Return a column of numbers. `Column.more` explains `more`."""
    return Column(header, "number", more), cell


def make_table(frame: pd.DataFrame, *cells: Cell, dim: Callable[[Row], bool] = lambda _: False) -> Table:
    """Return a table with a row for each row of a frame.

    Args:
        frame: The rows.
        *cells: The columns.
        dim: A function that returns whether a row has a fainter color.
    """
    rows = frame.to_dict("records")
    return Table(
        tuple(column for column, _ in cells),
        tuple(tuple(cell(row) for _, cell in cells) for row in rows),
        dim=frozenset(place for place, row in enumerate(rows) if dim(row)),
    )


# -- at a glance


@per_panel
def glance(report: Report) -> Iterator[Section]:
    """Yield the section that the first screen shows.

    The section has the best learning rates, whether the variant with the highest test score is better than
    the others, and the costs.
    """
    results = report.results
    is_tuned = len(results.comparison) > 0
    facts = verdicts.best_rate_facts(report.panel, results.best)
    rates = verdicts.decide(verdicts.BEST_RATES_RULES, facts)[1] if report.kind in GRIDS else ""
    yield Section(
        "glance",
        "",
        " ".join(filter(None, [rates, _standing(results), *_cost_sentences(results.costs)])),
        _tuned_table(results) if is_tuned else _best_table(report),
        note=_TUNED_NOTE if is_tuned else _BEST_NOTE,
    )


GRIDS = ("curve", "factors", "transfer")
"""The kinds of studies whose points form curves over the learning rate."""


def next_section(report: Report) -> Iterator[Section]:
    """Yield the section with what to do next."""
    if len(report.results.panels):
        step, command = report.next_step
        yield Section(NEXT, "What to do next", step=step, command=command)


NEXT = "next"
"""The name of the section with what to do next."""


_BEST_NOTE = (  # 0.01 is the value of `curves.TOLERANCE`
    "Best rate: the one with the highest mean validation score; (edge): the grid ends there, and the optimum "
    "may lie beyond. Within 0.01: decades of learning rate (1 is a factor of 10) around it whose score is at "
    "most 0.01 lower; ≥ if the grid ends before; not resolved if narrower than the grid's steps. Brackets: "
    "95 % interval over seeds and test items. Lost: validation score lost by training at that one rate. "
    "Usable: neither collapsed nor diverged."
)
_TUNED_NOTE = (
    "Each variant is tuned in every replicate; the test score of the run that validation chose counts. "
    "Differences in points (0.01 of the score) with simultaneous 95 % intervals. Best rate and decades of "
    "learning rate within the margin of the best score: from the runs of all replicates together; (edge): "
    "the grids end there, widen them; not resolved: narrower than a quarter of a decade."
)


def _standing(results: Results) -> str:
    """Return the sentence that says whether a variant is better than the others.

    In a replicated tuning, the sentence compares the variants with the tuned baseline. In other studies, it
    compares the variant with the highest test score with the others, and is empty for fewer than two
    variants.
    """
    compared = results.comparison
    if len(compared):
        name = verdicts.shown_name(results.study.settings.baseline)
        if not compared["difference_low"].notna().any():
            return f"No variant can be compared with tuned {name} yet."
        better = list(compared.loc[compared["outcome"] == "better", "variant"])
        if better:
            return f"Better than tuned {name} by these replicates: {formatting.join(better)}."
        return f"No variant is shown to be better than tuned {name}."
    own = results.best[results.best["test_score"].notna() & ~results.best["nothing_learned"]]
    own = own.sort_values("test_score", ascending=False)
    if len(own) < 2:
        return ""
    top, rest = own.iloc[0], own[1:]
    shown = f"{top['curve']} has the highest test score, {number(top['test_score'])}"
    if math.isnan(top["test_score_low"]):
        return f"{shown}; without an interval that is no ranking."
    near = rest.loc[rest["test_score_high"].fillna(rest["test_score"]) >= top["test_score_low"], "curve"]
    if len(near):
        seeds = count(int(top["seeds"]), "seed")
        return f"{shown}; {seeds} do not separate it from {formatting.join(list(near))}."
    return f"{shown}, and its interval lies above all others; the rates were chosen on the same seeds."


def _cost_sentences(costs: pd.DataFrame) -> Iterator[str]:
    """Yield the sentences on forgetting and on the time of the runs, as far as they are known."""
    forgotten = costs.dropna(subset="forgetting").sort_values("forgetting")
    if len(forgotten):
        ends = forgotten.iloc[[0, -1]].drop_duplicates("curve")
        shown = [f"{r['forgetting']:+.2f} ({r['curve']})" for r in ends.to_dict("records")]
        yield f"Forgetting: the loss on other text changes by {' to '.join(shown)} nats per token."
    if costs["study_seconds"].sum():
        seconds = costs["train_seconds"] + costs["evaluate_seconds"]
        each = dict.fromkeys((formatting.duration(seconds.min()), formatting.duration(seconds.max())))
        total = formatting.duration(costs["study_seconds"].sum())
        yield f"A run takes {' to '.join(each)}; all runs together took {total}."


def width_text(row: Row, points_of_curve: pd.DataFrame, name: str = "width") -> str:
    """Return the width of a range of learning rates as text, in decades.

    The text is "not resolved" if the width is smaller than the median distance between neighboring rates. The
    text of a lower bound starts with "≥".

    Args:
        row: The row of a curve in `best`.
        points_of_curve: The points of the curve.
        name: The column with the width.
    """
    import numpy as np

    if math.isnan(row[name]):
        return "-"
    gaps = np.diff(np.log10(np.sort(points_of_curve["learning_rate"].unique())))
    if not row[f"{name}_is_bound"] and len(gaps) and row[name] < np.median(gaps) - 1e-9:
        return "not resolved"
    return f"{'≥' if row[f'{name}_is_bound'] else ''}{number(row[name], 2)}"


def best_rate_text(row: Row) -> str:
    """Return the best learning rate or the best settings of a row of `best` as text.

    "(edge)" means that the best value is at the end of the tried values. "(flat)" means that both ends of the
    grid have the best score.
    """
    if math.isnan(row["learning_rate"]):
        return "-"
    if row["nothing_learned"]:
        return "nothing learnt"
    if row.get("bracket") == "both edges":
        return f"{row['rates']} (flat)"
    edge = row.get("bracket") in ("low edge", "high edge") or row.get("edges")
    return f"{row.get('settings') or row['rates']}{' (edge)' if edge else ''}"


def rates_text(rates: Iterable[float]) -> str:
    """Return learning rates as text, without duplicates and in ascending order, for example "3e-3, 1e-2"."""
    return ", ".join(map(rate, sorted(set(rates)))) or "-"


def _score_text(row: Row) -> str:
    """Return the test score with three digits, and its 95 % interval with two digits."""
    ends = formatting.interval(row["test_score_low"], row["test_score_high"], 2)
    return f"{number(row['test_score'])} {ends}".rstrip()


def _best_table(report: Report) -> Table:
    """Return the table with the best point of each curve or search.

    The last row is the untrained base model, if its score is known.
    """
    panel, results = report.panel, report.results
    # In a sensitivity study, the levels of the factors are points of the same curve but of other groups.
    points = results.points[results.points["group"].isin(results.best["group"])]
    own_points = dict(tuple(points.groupby("curve")))

    def width_of(name: str) -> Callable[[Row], str]:
        return lambda row: width_text(row, own_points[row["curve"]], name)

    def lost(row: Row) -> str:
        return number(math.nan if row["nothing_learned"] else row["lost"], 2)

    variant, score = text("variant", lambda r: r["curve"]), figure("test score", _score_text)
    usable = figure("usable runs", lambda r: f"{r['usable']}/{r['ended']}")
    more = (
        *_measured(results.best, "forgetting", more=False),
        figure("validation score", lambda r: formatting.estimate(r, "validation_score"), more=True),
        figure("gain over untrained", lambda r: formatting.estimate(r, "gain"), more=True),
        *_measured(results.best, "test_bits_per_byte", "test loss (bits per byte)"),
    )
    if report.kind not in GRIDS:
        cells = [
            *(variant, text("best point", best_rate_text), score),
            *(figure("points tried", lambda r: str(r["points"])), usable, *more),
            figure("steps trained", lambda r: f"{r['steps'] / max(r['max_steps'], 1):.0%}", more=True),
            text("runs", lambda r: r["states"], more=True),
        ]
    else:
        cells = [
            *(variant, figure("best rate", best_rate_text), figure("within 0.01", width_of("width")), score),
            figure("lost at LoRA's rate" if panel["reference"] else "lost at one rate", lost),
            *(usable, *more, figure("decades that keep 90 %", width_of("width_90"), more=True)),
            figure("within 0.01, 95 % interval", lambda r: formatting.estimate(r, "width", 2), more=True),
            figure("best rates without one seed", lambda r: rates_text(r["rates_without_a_seed"]), more=True),
            figure("lost within half a decade", lambda r: formatting.estimate(r, "lost_near"), more=True),
            figure("first rate that breaks down", lambda r: rate(r["cliff"]), more=True),
        ]
    table = make_table(
        results.best, *cells, dim=lambda r: r["nothing_learned"] or math.isnan(r["learning_rate"])
    )
    if math.isnan(panel["untrained_test"]):
        return table
    shown = {"variant": "untrained", "test score": number(panel["untrained_test"])}
    shown["validation score"] = number(panel["untrained_validation"])
    last = tuple(shown.get(column.header, "") for column in table.columns)
    return replace(table, rows=(*table.rows, last), dim=table.dim | {len(table.rows)})


def _measured(frame: pd.DataFrame, name: str, header: str = "", more: bool = True) -> Iterator[Cell]:
    """Yield the column of an estimate if it is known for a row."""
    if frame[name].notna().any():
        yield figure(header or name, lambda r: formatting.estimate(r, name), more)


def _tuned_table(results: Results) -> Table:
    name = verdicts.shown_name(results.study.settings.baseline)

    def difference(row: Row) -> str:
        ends = formatting.points_interval(row["difference_low"], row["difference_high"])
        return f"{points(row['difference'])} {ends or verdicts.missing_interval(row)}"

    def width(row: Row) -> str:
        if math.isnan(row["width"]):
            return "not resolved"
        return f"{'≥' if row['width_is_bound'] else ''}{number(row['width'], 2)}"

    def unless_baseline(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: "" if row["role"] == "baseline" else cell(row)

    return make_table(
        results.comparison,
        text("variant", lambda r: r["variant"]),
        figure("best rate", lambda r: rate(r["best_rate"]) + (" (edge)" if r["best_rate_at_edge"] else "")),
        figure("within the margin", width),
        figure("tuned test score", lambda r: number(r["test_score"])),
        figure(f"minus {name}", unless_baseline(difference)),
        text("outcome", lambda r: r["role"] if r["role"] in ("baseline", "unverified") else r["outcome"]),
        *_measured(results.comparison, "forgetting", more=False),
        *_measured(results.comparison, "forgetting_difference", f"forgetting minus that of {name}"),
        text(f"{name} matches or beats it", unless_baseline(lambda r: r["counts"]), more=True),
        figure("usable tunings", lambda r: f"{r['usable']}/{r['tunings']}", more=True),
        figure("test score, 95 % interval", lambda r: formatting.estimate(r, "test_score"), more=True),
        figure("usable runs", lambda r: f"{r['usable_runs']}/{r['ended_runs']}", more=True),
        figure("chosen rates", lambda r: r["chosen"] or "-", more=True),
        figure("replicates that decide", lambda r: number(r["replicates_to_decide"], 0), more=True),
        dim=lambda r: r["role"] == "baseline",
    )


# -- published numbers, verdicts and limits


def answer_sections(report: Report) -> Iterator[Section]:
    """Yield the section that compares the study with the published numbers of its answer key."""
    import pandas as pd

    found = report.results.answers
    if not len(found):
        return
    is_open = found["outcome"] == "not tested"
    groups = found[is_open].groupby(["reason", "quantity"], sort=False)
    untested = pd.DataFrame([_in_one_row(own) for _, own in groups])
    tested = found[~is_open].sort_values("outcome", kind="stable")  # those that do not come out are first
    yield Section(
        "answers",
        "Published numbers",
        answers.summarize(found),
        make_table(
            pd.concat([tested, untested]) if len(untested) else tested,
            text("published number", lambda r: r["what"]),
            text("answer", lambda r: (r["reason"] and f"not tested: {r['reason']}") or r["outcome"]),
            text("measured", lambda r: "" if r["reason"] else _measured_text(r)),
            text("published", _published_text),
            text("source", lambda r: r["source"], more=True),
            dim=lambda r: bool(r["reason"]),
        ),
        note=_ANSWERS_NOTE,
    )


_ANSWERS_NOTE = (
    "Reproduced: at most the tolerance, behind ±, from the published number. Scores from 0 to 1; best rates, "
    "their order and ratios in decades of the learning rate. Brackets: 95 % interval over seeds."
)


def _in_one_row(untested: pd.DataFrame) -> dict[str, Any]:
    """Return one row for the published numbers of one kind that are not tested for one reason."""
    first: dict[str, Any] = untested.iloc[0].to_dict()
    kind = f"{len(untested)} {first['quantity'].replace('_', ' ')}s"
    return first if len(untested) == 1 else {**first, "what": kind, "published": math.nan}


def _measured_text(row: Row) -> str:
    shown = rate if row["quantity"] == "best_rate" else number
    if row["quantity"] == "order":
        return str(row["order"])
    if row["quantity"] == "collapse":
        return f"{row['measured']:.0%} of runs"
    ends = formatting.interval(row["measured_low"], row["measured_high"])
    return f"{shown(row['measured'])} {ends}".rstrip()


def _published_text(row: Row) -> str:
    if math.isnan(row["published"]):
        return ""
    if row["quantity"] in ("best_rate", "ratio"):
        shown = rate if row["quantity"] == "best_rate" else number
        return f"{shown(row['published'])} ± {number(row['tolerance'], 2)} decades"
    return f"{number(row['published'])} ± {number(row['tolerance'])}"


def verdict_sections(report: Report) -> Iterator[Section]:
    """Yield a section for each verdict of the study."""
    found = (verdicts.Verdict(**row) for row in report.results.verdicts.to_dict("records"))
    yield from verdict_cards((replace(each, next_command="") for each in found), [report.next_step[0]])


def verdict_cards(found: Iterable[verdicts.Verdict], at_a_glance: Collection[str]) -> Iterator[Section]:
    """Yield a section for each verdict.

    Args:
        found: The verdicts.
        at_a_glance: The next steps that another section shows. The sections of the verdicts do not repeat
            them.
    """
    for place, verdict in enumerate(found, 1):
        is_new = verdict.next_step not in at_a_glance
        yield Section(
            f"verdict-{place}" if place > 1 else "verdict",
            verdict.heading,
            verdict.answer,
            note=verdict.design,
            step=verdict.next_step if is_new else "",
            command=verdict.next_command if is_new else "",
            outcome=verdict.outcome,
        )


def limit_sections(report: Report) -> Iterator[Section]:
    """Yield the faults of the data as an alarm, and the other limits of the results as a warning."""
    faults = data_warnings(report.results.study.sources)
    others = [each for each in report.results.warnings if each not in faults]
    if faults:
        yield Section("faults", "The data", "\n\n".join(faults), level="alarm")
    if others:
        yield Section("limits", count(len(others), "limitation"), "\n\n".join(others), level="warning")


# -- pictures and tables


@per_panel
def factor_sections(report: Report) -> Iterator[Section]:
    """Yield the sections of a sensitivity study: one with a chart, and one with a table for each variant."""
    rows = report.results.factors
    if not len(rows):
        return
    yield Section(
        "factors", "What each hyperparameter costs", chart=charts.factor_bars(rows), note=_FACTOR_NOTE
    )
    claims = report.results.claims.set_index("variant")
    for variant, own in rows.groupby("variant", sort=False):
        claim = claims.loc[variant]
        outcome = claim["outcome"] if claim["counted"] else "not counted"
        ranges = {"half": "half of the range", "measured": "all of it", "double": "double the range"}
        shown = [f"{words} {claim[f'outcome_{key}']}" for key, words in ranges.items()]
        told = f"Best rate {rate(claim['best_rate'])}. The learning rate matters most: {', '.join(shown)}."
        yield Section(f"factors-{variant}", f"{variant}: {outcome}", told, _factor_table(own))


_FACTOR_NOTE = (
    "Lost test score in points (0.01 of the score), means over seeds with 95 % intervals. Set blindly (A): "
    "the value is drawn from the factor's range, and nothing else reacts. Tuned again (B): the same with the "
    "learning rate tuned at each value; for the learning rate, with that other factor tuned that makes up "
    "for it best. * the learning rate, or what it could replace. Off by 3.16 (D): the value is wrong by that "
    "factor, either way. Gain (C): from tuning this alone, all else at the published default."
)


def _factor_table(rows: pd.DataFrame) -> Table:
    def contrast(name: str) -> Callable[[Row], str]:
        return lambda row: points(row.get(f"{name}_contrast_low", math.nan), sign=False)

    return make_table(
        rows,
        text("factor", lambda r: f"{r['title']}{'*' if r['alias'] else ''}"),
        figure("set blindly (A)", lambda r: formatting.points_estimate(r, "misset")),
        figure("tuned again (B)", lambda r: formatting.points_estimate(r, "retuned")),
        figure("off by 3.16", lambda r: points(r["off_by_half_decade"], sign=False)),
        figure("gain", lambda r: points(r["gain"], sign=False)),
        figure("usable runs", lambda r: f"{r['usable']}/{r['ended']}"),
        figure("off by 2", lambda r: points(r["off_by_2"], sign=False), more=True),
        figure("rate minus this (A), at least", contrast("misset"), more=True),
        figure("rate minus this (B), at least", contrast("retuned"), more=True),
        text("levels", lambda r: r["levels"], more=True),
        text("default", lambda r: r["default"], more=True),
    )


@per_panel
def replacement_table(report: Report) -> Iterator[Section]:
    """Yield the section on factors that the learning rate could replace, such as alpha."""
    rows = report.results.replacements
    if not len(rows):
        return
    yield Section(
        "replacements",
        "Could the learning rate replace it?",
        table=make_table(
            rows,
            text("variant", lambda r: r["variant"]),
            text("factor", lambda r: r["title"]),
            figure("x default", lambda r: f"{r['times']:.3g}"),
            figure("change of the score", lambda r: formatting.points_estimate(r, "difference", sign=True)),
            figure("best rate x", lambda r: formatting.estimate(r, "rate_ratio") if r["resolved"] else "end"),
            text("the rate", lambda r: r["outcome"]),
            figure("grid error", lambda r: points(r["grid_error"], sign=False), more=True),
            figure("seeds", lambda r: str(r["seeds"]), more=True),
        ),
        note="Each level and the default at the best of their rates; points with 95 % intervals. Could: all "
        "intervals lie within the margin, less the error of the grid. Could not: one lies outside "
        "(Bonferroni). A factor that acts exactly as a rate has a best rate of 1 / (x default).",
    )


@per_panel
def transfer_sections(report: Report) -> Iterator[Section]:
    """Yield the sections of a study of transfer: slopes, best rates, and what carrying a rate over loses."""
    results = report.results
    if not len(results.transfer):
        return
    yield Section(
        "transfer",
        "The best rate as a power of the factor",
        table=make_table(
            results.transfer,
            text("curve", lambda r: r["curve"]),
            figure("slope", lambda r: formatting.estimate(r, "slope", 2)),
            figure("published", lambda r: number(r["known_slope"], 2)),
            figure("largest loss", lambda r: formatting.points_estimate(r, "worst")),
            text("from, to", lambda r: r["worst_pair"] or "-"),
            text("left out", lambda r: r["left_out"] or "-", more=True),
        ),
        chart=charts.transfer(report.panel, results.transfer, results.transfer_levels),
        note="At slope b, twice the factor has 2 to the power of b times the best rate. Largest loss: test "
        "score in points that a level loses at the best rate of another. 95 % intervals over seeds.",
    )

    def best_rate(row: Row) -> str:
        ends = [rate(row[f"best_rate_{end}"]) for end in ("low", "high")]
        why = f" ({row['left_out']})" if row["left_out"] else ""
        return f"{rate(row['best_rate'])}{'' if '-' in ends else f' [{ends[0]}, {ends[1]}]'}{why}"

    yield Section(
        "transfer_levels",
        "Best rate of each level",
        table=make_table(
            results.transfer_levels,
            text("curve", lambda r: r["curve"]),
            text("level", lambda r: r["level"]),
            figure("best rate", best_rate),
            figure("seeds", lambda r: str(r["seeds"])),
        ),
    )


@per_panel
def comparison_charts(report: Report) -> Iterator[Section]:
    """Yield the sections with the charts of a replicated tuning.

    One chart shows the differences from the tuned baseline. The other shows the curves of all replicates.
    """
    results, settings = report.results, report.results.study.settings
    if len(results.comparison) > 1:
        yield Section(
            "forest",
            f"Difference from tuned {verdicts.shown_name(settings.baseline)}",
            chart=charts.forest(report.panel, results.comparison, settings.margin),
            note="Mean difference of the test score, simultaneous 95 % interval; the band is the margin.",
        )
    if len(results.pooled):
        yield Section(
            "tuned_curves",
            "Score over learning rate, all replicates",
            chart=charts.tuned_curves(report.panel, results.pooled, results.best),
            note="Mean validation score in bins of a quarter of a decade; ticks are the chosen rates.",
        )


@per_panel
def curve_charts(report: Report) -> Iterator[Section]:
    """Yield the sections with the charts of a grid.

    The charts show the scores over the learning rate, a heat map of the scores, and the test scores at the
    common rate and at the best rates.
    """
    panel, best = report.panel, report.results.best
    if report.kind not in GRIDS:
        return
    points, runs = (
        each[each["group"].isin(best["group"])] for each in (report.results.points, report.results.runs)
    )
    if points["validation_score"].isna().all():
        return
    if report.kind != "transfer":  # its own chart has a curve for each level
        yield Section(
            "curves",
            "Score over learning rate",
            chart=charts.score_curves(panel, points, best, runs),
            note="Mean over seeds with its 95 % interval; the best rate is ringed. Single runs are dots, "
            "collapsed ones triangles, diverged ones crosses at the score of a constant answer. The line is "
            "dashed across a cliff, between the last usable rate and the first at which most runs break.",
        )
    yield Section(
        "heatmap",
        "Every variant and rate",
        chart=charts.heat_map(panel, points, best),
        note="Mean validation score; a frame marks the best rate. ▽ most runs collapsed or diverged.",
    )
    if report.kind != "transfer" and best["test_at_common_rate"].notna().sum() > 1:
        yield Section(
            "spread",
            "One rate for all, or each its own",
            chart=charts.spread(panel, best),
            note=f"Test score at {panel['common_label']} (hollow) and at the rate that the variant's own "
            "validation scores chose (filled, with its 95 % interval).",
        )


@per_panel
def ratio_table(report: Report) -> Iterator[Section]:
    """Yield the section with the ratios of the best learning rates, beside published ratios."""
    rows = report.results.ratios
    rows = rows[rows["baseline"] != ""] if len(rows) else rows
    if not len(rows):
        return

    def ratio(row: Row) -> str:
        low, high = (f"{row[f'ratio_{end}']:.2g}" for end in ("low", "high"))
        if math.isnan(row["ratio"]):
            return f"≥ {low}" if low != "nan" else f"≤ {high}" if high != "nan" else "-"
        return f"{row['ratio']:.2g}" + (f" [{low}, {high}]" if low != "nan" else "")

    yield Section(
        "ratios",
        "Ratios of the best learning rates",
        table=make_table(
            rows,
            text("variant", lambda r: r["curve"]),
            text("over", lambda r: r["baseline"]),
            figure("ratio", ratio),
            figure("published", lambda r: "-" if math.isnan(r["published"]) else f"{r['published']:.2g}"),
            text("source", lambda r: r["source"] or "-", more=True),
        ),
        note="Optima of parabolas in the logarithm of the rate, with 95 % intervals; ≥ and ≤: an optimum "
        "lies at an end of its grid, so this is a bound. Published ratios are of other models and ranks.",
    )


@per_panel
def search_charts(report: Report) -> Iterator[Section]:
    """Yield the section with the chart of a search, which shows the points and the best score so far."""
    points, best = report.results.points, report.results.best
    if report.kind == "search" and points["validation_score"].notna().any():
        yield Section(
            "search",
            "Points of the search",
            chart=charts.search_points(report.panel, points, best),
            note="Left: validation score of each point over its learning rate. Right: the best score so far.",
        )


@per_panel
def loss_charts(report: Report) -> Iterator[Section]:
    """Yield the section with the chart of training losses at the best and the neighboring learning rates."""
    results = report.results
    losses = loss_frame(results.runs, results.best, results.records, neighbors=report.kind != "search")
    if len(losses):
        yield Section(
            "training",
            "Training curves",
            chart=charts.losses(losses),
            note="Mean over the runs at the best learning rate and at the next ones.",
        )


def adapters(report: Report) -> Iterator[Section]:
    """Yield the section with the best run of each variant and the command that exports its adapter."""
    results = report.results
    runs = results.runs.set_index("fingerprint")
    best = results.best_lanes
    best = best.assign(seed=[runs.loc[own, "seed"] for own in best["fingerprint"]])

    def export(row: Row) -> str:
        folders = {"output": report.output, "store": report.store}
        return store_command("export", results.name, row["fingerprint"][:12], **folders)

    table = make_table(
        best,
        text("variant", lambda r: r["variant"]),
        text("task", lambda r: r["task"]),
        figure("rate", lambda r: rate(r["learning_rate"])),
        figure("seed", lambda r: str(r["seed"])),
        (Column("command", "command"), export),
    )
    about = "The best run of the best point of each variant. The command writes a PEFT folder."
    if table.rows:
        yield Section("adapters", "Trained adapters", about, table, folded=True)


@per_panel
def cost_sections(report: Report) -> Iterator[Section]:
    """Yield the section on costs: the training time, memory and parameters of each curve."""
    costs = report.results.costs
    if not len(costs):
        return
    scored = costs[costs["test_score"].notna() & (costs["train_seconds"] > 0)]
    yield Section(
        "costs",
        "Costs",
        _time_use_text(report.results.runs),
        make_table(
            costs,
            text("variant", lambda r: r["curve"]),
            figure("test score", lambda r: number(r["test_score"])),
            figure("training of a run", lambda r: formatting.duration(r["train_seconds"])),
            figure("evaluation of a run", lambda r: formatting.duration(r["evaluate_seconds"])),
            figure("peak memory", lambda r: formatting.memory(r["peak_memory"])),
            figure("trainable parameters", lambda r: f"{r['trainable_parameters']:,}"),
            figure("all its runs", lambda r: formatting.duration(r["study_seconds"]), more=True),
        ),
        charts.cost_scatter(scored) if len(scored) > 1 else None,
        note="Means over finished runs; the seconds of a run are its share of its lane group's. The step "
        "line is the Pareto front: no other variant is as cheap and as good.",
        folded=True,
    )


def _time_use_text(runs: pd.DataFrame) -> str:
    """Return a sentence with the share of each kind of work in the trainers' time; empty if it is unknown."""
    used = time_use(runs)
    total = sum(used.values())
    shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in used.items())
    return f"Time of the trainers, {formatting.duration(total)} in total: {shares}." if used else ""


@per_panel
def point_tables(report: Report) -> Iterator[Section]:
    """Yield the section with all points of a grid and the commands that train their runs again."""
    results = report.results
    if report.kind not in GRIDS:
        return
    points = results.points[results.points["group"].isin(results.best["group"])]
    fingerprints = results.runs.groupby("point")["fingerprint"].agg(list)
    shown = [label for label in ("collapsed", "diverged", "stopped", "failed") if points[label].any()]
    yield Section(
        "points",
        "Every rate, with the command that trains it again",
        table=make_table(
            points.sort_values(["curve", "learning_rate"]),
            text("variant", lambda r: r["curve"]),
            figure("rate", lambda r: formatting.exact_rate(r["learning_rate"]) + " ◯" * r["is_best"]),
            figure("seeds", lambda r: str(r["scored"])),
            figure("validation score", lambda r: formatting.estimate(r, "validation_score")),
            figure("test score", lambda r: formatting.estimate(r, "test_score")),
            *(figure(label, lambda r, label=label: str(r[label])) for label in shown),  # type: ignore[misc]
            (
                Column("command", "command"),
                lambda r: results.study.train_again(fingerprints[r["point"]], store=report.store),
            ),
        ),
        note="◯ the best rate. Means are over the seeds that were not stopped early.",
        folded=True,
    )


@per_panel
def tuning_tables(report: Report) -> Iterator[Section]:
    """Yield up to two sections with a table about tuning.

    The first table has every point of a search, or the best point of every tuning of a replicated tuning. The
    second table compares each variant with LoRA at LoRA's best rate and at the variant's own best rate.
    """
    results, is_search = report.results, report.kind == "search"
    if report.kind not in GRIDS:
        yield Section(
            "tried",
            "Every point" if is_search else "Every tuning",
            table=make_table(
                (results.points if is_search else results.best).sort_values(
                    ["curve", "order" if is_search else "replicate"]
                ),
                text("variant", lambda r: r["curve"]),
                *(() if is_search else (figure("replicate", lambda r: str(r["replicate"])),)),
                text("settings", lambda r: r["settings"] or "-"),
                figure("validation score", lambda r: number(r["validation_score"])),
                figure("test score", lambda r: number(r["test_score"])),
                (Column("fingerprint", "code"), lambda r: r["fingerprint"][:12]),
            ),
            folded=True,
        )
    if len(results.fixed_rate):
        signed = partial(formatting.points_estimate, sign=True)
        yield Section(
            "fixed_rate",
            "At LoRA's best rate, and at each variant's own",
            table=make_table(
                results.fixed_rate,
                text("variant", lambda r: r["variant"]),
                figure("lost at LoRA's rate", lambda r: formatting.points_estimate(r, "regret")),
                figure("minus LoRA there", lambda r: signed(r, "at_baseline_rate")),
                figure("minus LoRA at its own rate", lambda r: signed(r, "at_own_rate")),
                text("order changes", lambda r: {True: "yes", False: "no"}.get(r["reversal"], "open")),
            ),
            note="Test scores, differences in points with simultaneous 95 % intervals.",
            folded=True,
        )


MEANINGS = {
    "failed": "missing: the same command tries them again",
    "stopped": "stopped early, so part of no mean",
    "diverged": "counted as the floor",
    "collapsed": "finished, but no better than the untrained model; counted as their score",
}
"""Label of a run -> how the analysis counts runs with this label."""


def broken_runs(report: Report) -> Iterator[Section]:
    """Yield a section for each label of `MEANINGS` that occurs. It lists the runs with this label."""
    runs = report.results.runs.sort_values(["panel", "curve", "learning_rate", "seed"])
    for label, meaning in MEANINGS.items():
        table = make_table(
            runs[runs["label"] == label],
            text("variant", lambda r: r["curve"]),
            text("task", lambda r: r["panel"]),
            figure("rate", lambda r: formatting.exact_rate(r["learning_rate"])),
            figure("seed", lambda r: str(r["seed"])),
            figure("steps", lambda r: str(r["steps"])),
            text("reason", lambda r: r["reason"] or "-"),
            (Column("fingerprint", "code"), lambda r: r["fingerprint"][:12]),
        )
        if table.rows:
            yield Section(f"runs-{label}", f"{len(table.rows)} {label}: {meaning}", table=table, folded=True)


@per_panel
def harness_scores(report: Report) -> Iterator[Section]:
    """Yield the section with the scores of lanes in an evaluation harness, if any lane was scored."""
    found = report.results.harness
    if not len(found):
        return
    yield Section(
        "harness",
        "Scores in lm-evaluation-harness",
        table=make_table(
            found[found["is_whole"]].sort_values(["task", "settings", "subtask", "metric"], kind="stable"),
            text("variant", lambda r: r["curve"]),
            text("task", lambda r: ", ".join(filter(None, [r["subtask"], r["settings"]]))),
            text("metric", lambda r: r["metric"].removesuffix(",none")),
            figure("score", lambda r: number(r["score"])),
            figure("untrained", lambda r: number(r["untrained"])),
            figure("difference", lambda r: formatting.estimate(r, "difference")),
        ),
        note="Brackets: 95 % interval over the items, of the same items before and after; other runs of the "
        "variant may differ by more. The harness alone says whether a higher score is better.",
    )


def definitions(report: Report) -> Iterator[Section]:
    """Yield the section that defines the numbers of the report."""
    yield Section("definitions", "What these numbers mean", _DEFINITIONS, folded=True)


_DEFINITIONS = """\
Best rate: the rate with the highest validation mean over seeds, of equal ones the lowest. Test scores enter
no choice. At the grid's edge the optimum may lie beyond.

Intervals: of scores and gains the t interval over seeds, widened by the error of the test items (Wilson)
where their results are known. Of decades and lost scores the jackknife over seeds; it covers less than 95 %
where the top of the curve is flatter than the noise, so that it shows a scale and is no test. Of
differences the paired t interval over replicates, with Bonferroni's correction for the number of variants.

Usable runs neither diverged nor collapsed, of those that ended. In means a collapsed run counts as its
score and a diverged one as the score of a constant answer. A rate at which runs were stopped early is
chosen only if it is the best even if every stopped run counts as a constant answer.

Forgetting: the loss after training minus that of the untrained base model on a text that is part of no task
(for a small base model, on examples of its pretraining), in nats per token. It enters no choice.

Bits per byte: the loss of the answers without special tokens, over their UTF-8 bytes, so that models with
different tokenizers can be compared.

Decades: the width of the range of rates around the best (1 decade is a factor of 10) with a score within
0.01 of the best one, or with at least 90 % of the way from a constant answer to it. Between rates the score
is interpolated linearly in the logarithm of the rate. "Not resolved": narrower than the spacing of the
grid.

First rate that breaks down: the first rate above the best at which more than half of the seeds diverge, or
the score has fallen half of the way to that of a constant answer."""


def provenance(report: Report) -> Iterator[Section]:
    """Yield a section with the study's command and the software and hardware of its runs.

    If MLflow's tracking URI is known, a second section opens the runs in MLflow.
    """
    import pandas as pd

    counts = count_provenance(report.results.records)
    shown = {name: ", ".join(f"{value} ({n})" for value, n in own.items()) for name, own in counts.items()}
    yield Section(
        "provenance",
        "Commands and versions",
        table=make_table(
            pd.DataFrame({"name": shown.keys(), "values": shown.values()}),
            text("software and hardware", lambda r: r["name"]),
            text("value (runs)", lambda r: r["values"]),
        ),
        step="The whole study; runs with a result are not trained again:",
        command=report.results.study.command,
        in_terminal=False,
    )
    if report.tracking_uri:
        where = mlflow_command(report.tracking_uri) or report.tracking_uri
        yield Section("mlflow", "All runs in MLflow", command=where, in_terminal=False)


def mlflow_command(tracking_uri: str) -> str:
    """Return the command that opens the runs in MLflow's UI; empty without a URI, or for an MLflow server."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    # MLflow starts four workers by default. On a busy machine, their start may exceed MLflow's time limit.
    return shlex.join(["mlflow", "ui", "--workers", "1", "--backend-store-uri", tracking_uri])


SECTIONS: tuple[MakeSections, ...] = (
    glance,
    next_section,
    answer_sections,
    verdict_sections,
    limit_sections,
    factor_sections,
    replacement_table,
    transfer_sections,
    comparison_charts,
    curve_charts,
    ratio_table,
    search_charts,
    loss_charts,
    cost_sections,
    adapters,
    point_tables,
    tuning_tables,
    harness_scores,
    broken_runs,
    definitions,
    provenance,
)
"""The functions that make the sections of every report, in the order of the sections."""


def make_sections(report: Report) -> list[Section]:
    """Return all sections of a report."""
    return [section for make in SECTIONS for section in make(report)]


def setup_line(results: Results) -> str:
    """Return the setup of a study in one line, which can serve as a caption of its charts.

    The line has the sizes of the splits, the metric, the rank, the batch size, the steps, the seeds, the
    dates and the device. It is empty if the study has no runs.
    """
    import pandas as pd

    runs = results.runs
    if not len(runs):
        return ""

    def shown(column: str, unit: str = "{}") -> str:
        values = sorted(runs[column].dropna().unique()) if column in runs else []
        if not values:
            return ""
        texts = [f"{value:g}" if isinstance(value, float) else f"{value}" for value in values]
        return unit.format(texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}")

    rows = " / ".join(shown(f"task_{split}_size") for split in ("train", "validation", "test"))
    seeds = sorted(runs["seed"].unique())
    started, ended = runs["started"].min(), runs["ended"].max()
    parts = [
        f"{rows} rows (train / validation / test)",
        ", ".join(sorted(metric.replace("_", " ") for metric in runs["metric"].unique())),
        shown("rank", "rank {}"),
        shown("alpha", "alpha {}"),
        shown("batch_size", "batch {}"),
        shown("steps_horizon", "{} steps"),
        ", ".join(sorted(runs["schedule"].dropna().unique())),
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}",
    ]
    if pd.notna(started) and started.year > 1970:
        spent = formatting.duration(max(0.0, (ended - started).total_seconds()))
        parts += [f"{started:%Y-%m-%d}", f"{spent} from first start to last end"]
    parts.append(", ".join(sorted(runs["device"].dropna().unique())))
    return " · ".join(filter(None, parts))
