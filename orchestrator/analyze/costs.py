"""The costs of a study (runs, time and memory of each curve), and its training losses over the steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.record.schema import Record
from orchestrator.record.tables import make_curves

if TYPE_CHECKING:
    import pandas as pd

MAX_BINS = 100
"""The largest number of points of a line of losses. Each point is the mean over a bin of consecutive
steps."""


def cost_frame(runs: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the costs of each curve that has a finished run, by panel, the best score first.

    Args:
        runs: The runs, from `run_frame`.
        chosen: The columns test_score and forgetting at the best point, indexed by panel and curve.

    Returns:
        One row for each curve, with these columns:

        - panel, variant, curve: the names of the curve.
        - runs: the number of finished runs.
        - train_seconds, evaluate_seconds: the mean time of a finished run. The time of a run is its equal
          share of the time of its lane group, see `Cost`.
        - peak_memory: the largest memory in bytes of all lanes of a lane group together; 0 if unknown.
        - trainable_parameters: the median number of trainable parameters.
        - study_seconds: the training and evaluation time of all runs, including unfinished ones.
        - test_score, forgetting: the values at the best point; NaN if unknown.
    """
    import pandas as pd

    finished = runs[runs["state"] == "finished"].groupby(["panel", "curve"])
    costs = finished.agg(
        variant=("variant", "first"),
        runs=("seed", "size"),
        train_seconds=("train_seconds", "mean"),
        evaluate_seconds=("evaluate_seconds", "mean"),
        peak_memory=("peak_memory", "max"),
        trainable_parameters=("trainable_parameters", lambda own: int(own.quantile(interpolation="higher"))),
    )
    total = runs["train_seconds"] + runs["evaluate_seconds"]
    costs["study_seconds"] = total.groupby([runs["panel"], runs["curve"]]).sum().reindex(costs.index)
    names = ["test_score", "forgetting"]
    costs[names] = chosen[names].reindex(costs.index)
    ordered = costs.reset_index().sort_values(
        ["panel", "test_score", "curve"], ascending=[True, False, True], ignore_index=True
    )
    return pd.DataFrame(ordered)


def time_use(runs: pd.DataFrame) -> dict[str, float]:
    """Return how the trainers spent their time: kind of work -> seconds, in descending order.

    Records without these times are left out, and so are kinds of work without time.
    """
    known = runs[(runs["start_seconds"] > 0) | (runs["other_seconds"] > 0)]
    named = {
        "optimizer steps": known["train_seconds"].sum(),
        "evaluation": (known["evaluate_seconds"] - known["generate_seconds"]).sum(),
        "generated answers": known["generate_seconds"].sum(),
        "start of trainers": known["start_seconds"].sum(),
        "other": known["other_seconds"].sum(),
    }
    ordered = sorted(named.items(), key=lambda item: -item[1])
    return {name: float(seconds) for name, seconds in ordered if seconds > 0}


def loss_frame(
    runs: pd.DataFrame, best: pd.DataFrame, records: Iterable[Record], neighbors: bool
) -> pd.DataFrame:
    """Return the training losses of each curve at its best learning rate and at the neighboring rates.

    Args:
        runs: The runs, from `run_frame`.
        best: The best points.
        records: The records, from which the losses are read.
        neighbors: False to leave out the neighboring rates. The points of a search have no neighbors that
            differ in the rate alone.

    Returns:
        One row for each bin of steps, with these columns:

        - panel, curve: the names of the curve.
        - role: "best", "lower" or "higher".
        - learning_rate: the lowest learning rate of the runs with this role.
        - step: the middle of the bin.
        - loss: the mean loss of the runs in the bin.
    """
    import numpy as np
    import pandas as pd

    wanted, lines = _chosen_runs(runs, best, neighbors), ["panel", "curve", "role"]
    wanted["learning_rate"] = wanted.groupby(lines)["learning_rate"].transform("min")
    chosen = set(wanted["fingerprint"])
    steps = make_curves(record for record in records if record.fingerprint in chosen)
    table = wanted.merge(steps.to_pandas()[["fingerprint", "step", "train_loss"]], on="fingerprint")
    table = table.rename(columns={"train_loss": "loss"})[np.isfinite(table["train_loss"])]
    size = np.ceil(table.groupby(lines)["step"].transform("max") / MAX_BINS)
    middle = ((table["step"] - 1) // size + 0.5) * size + 0.5
    ordered = table.assign(step=middle).sort_values("step", kind="stable")
    means = ordered.groupby([*lines, "learning_rate", "step"], sort=False)["loss"].mean()
    return pd.DataFrame(means.reset_index())


def _chosen_runs(runs: pd.DataFrame, best: pd.DataFrame, neighbors: bool) -> pd.DataFrame:
    """Return the runs at the best rate of each row of `best` and at the neighboring rates."""
    import pandas as pd

    parts = [runs.head(0).assign(role="")]
    by_group = dict(tuple(runs.groupby(["panel", "group"])))
    for row in best[best["learning_rate"].notna()].to_dict("records"):
        own = by_group[row["panel"], row["group"]]
        rates = sorted(own["learning_rate"].unique())
        place = rates.index(row["learning_rate"])
        parts.append(own[own["point"] == row["point"]].assign(role="best"))
        for role, index in (("lower", place - 1), ("higher", place + 1)):
            if neighbors and 0 <= index < len(rates):
                parts.append(own[own["learning_rate"] == rates[index]].assign(role=role))
    return pd.concat(parts)
