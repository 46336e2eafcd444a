"""The expected outputs of six studies, frozen in the files of `oracle/`.

Four are reports on studies of known truth, one is the report on the published scores, and one is the records
of a trained study. The files have outcomes, best rates, scores with intervals, states and contrasts by
variant. Only the functions of this module depend on the format of `summary.json` and of records. After an
intended change of the numbers, write the files again (`trained` starts Ray):

    python tests/promises/oracle.py [study tuned sensitivity transfer published trained]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import as_a_user
import known_truth

FOLDER = Path(__file__).with_name("oracle")
STUDY = {
    "study": "grid",
    "tuned": "tuned",
    "sensitivity": "factors",
    "transfer": "transfer",
    "published": "published",
}
"""Name of a file in `oracle/` -> name of the study."""
PUBLISHED = ("published", "--task", "gsm8k", "glue")
TRAINED = ("--variants", "lora", "pissa", "hira", "--learning-rates", "3e-3", "1e-2", "1e3", "--seeds", "1")
TRAINED_STEPS = ("--steps", "12", "--evaluations", "2", "--widen", "0", "--study", "trained")
EXACT, PROCESSORS = 1e-6, 1e-5
"""Largest differences from frozen numbers. EXACT is for reports. PROCESSORS is for losses of training, which
is rounded differently on each type of processor."""


# -- reports


def numbers(results: Any) -> dict[str, Any]:
    """Return the numbers of results from `orchestrator.load`, as in `summary.json`."""
    found: dict[str, Any] = results.to_json()
    return found


def _estimate(row: Mapping[str, Any], name: str) -> list[float | None]:
    """Return [mean, low, high] of a column of a row; low and high are None without an interval."""
    return [row[name], row[f"{name}_low"], row[f"{name}_high"]]


def outcomes(summary: Mapping[str, Any]) -> list[str]:
    """Return the outcome of each verdict, the most important first."""
    return [verdict["outcome"] for verdict in summary["verdicts"]]


def best(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant its best learning rate, and [mean, low, high] of its scores at this rate."""
    return {
        curve["variant"]: {
            "best rate": curve["learning_rate"],
            "validation": _estimate(curve, "validation_score"),
            "test": _estimate(curve, "test_score"),
        }
        for curve in summary["best"]
    }


def rows(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant except LoRA its tuned test score, its difference from LoRA, and the outcome."""
    return {
        row["variant"]: {
            "test": _estimate(row, "test_score"),
            "difference": _estimate(row, "difference"),
            "outcome": row["outcome"],
            "LoRA matches or beats it": row["counts"],
            "pairs": row["pairs"],
        }
        for row in summary["comparison"]
        if row["role"] != "baseline"
    }


def reversals(summary: Mapping[str, Any]) -> dict[str, bool | None]:
    """Return for each variant whether its order relative to LoRA depends on the learning rate."""
    return {row["variant"]: row["reversal"] for row in summary["fixed_rate"]}


def effects(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return variant -> factor -> the score lost if the factor is set blindly, and if the rate is retuned."""
    found: dict[str, Any] = {}
    for row in summary["factors"]:
        found.setdefault(row["variant"], {})[row["factor"]] = {
            "set blindly": _estimate(row, "misset"),
            "tuned again": _estimate(row, "retuned"),
        }
    return found


def transfer(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return curve -> the slope of its best rate, the published one, and what carrying a rate over loses."""
    return {
        row["curve"]: {
            "slope": _estimate(row, "slope"),
            "published": row["known_slope"],
            "lost": [row["worst_pair"], *_estimate(row, "worst")],
            "left out": row["left_out"],
        }
        for row in summary["transfer"]
    }


def _lost(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant [value, low, high] of the score that it loses at LoRA's best rate."""
    return {row["variant"]: _estimate(row, "lost") for row in summary["best"]}


def _published_task(summary: Mapping[str, Any], panel: Mapping[str, Any]) -> dict[str, Any]:
    best, winners, noise = (
        [row for row in summary[frame] if row["task"] == panel["task"]]
        for frame in ("best", "winners", "noise")
    )
    variants = {v["variant"]: [v["rank"], v["test_score"], _rates(v["rates"])] for v in best}
    return {
        "rank, best score, best rates": variants,
        "span": [panel["span"], panel["half_span"]],
        "winners": {f"{each['learning_rate']:g}": sorted(each["winner"]) for each in winners},
        "LoRA's rank in repeats": {f"{each['noise']:g}": [each["low"], each["high"]] for each in noise},
    }


def _rates(text: str) -> list[float]:
    """Return the rates in a text like "5e-4 = 1e-3"."""
    return [float(rate) for rate in text.split(" = ")]


def published(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each task of the survey the ranks, spans and winners."""
    return {panel["task"]: _published_task(summary, panel) for panel in summary["panels"]}


def report(name: str, folder: Path) -> dict[str, Any]:
    """Return those values of a report in `folder/results` that are compared with the frozen ones."""
    summary = json.loads((folder / "results" / STUDY[name] / "summary.json").read_text())
    found: dict[str, Any] = {"outcomes": outcomes(summary)}
    if name == "published":
        return found | {"tasks": published(summary)}
    found["states"] = summary["states"]
    if name == "tuned":
        return found | {"rows": rows(summary), "reversals": reversals(summary)}
    if name == "transfer":
        return found | {"curves": transfer(summary)}
    found["best"] = best(summary)
    return found | ({"lost": _lost(summary)} if name == "study" else {"effects": effects(summary)})


# -- records of a trained study


def train(folder: Path) -> None:
    """Train a small study on a user's data, in `folder/results`."""
    own = known_truth.own_data(folder)
    words = [word for name, value in own.items() for word in (f"--{name}", value)]
    print(as_a_user.succeed("study", *words, *TRAINED, *TRAINED_STEPS, cwd=folder))


def trained(folder: Path) -> dict[str, Any]:
    """Return the records in `folder/results` by variant, rate and seed.

    For a learning rate of 1 or more, only the state is returned, because such a lane magnifies rounding.
    """
    found = {}
    for record in as_a_user.records(folder).values():
        run = known_truth.run_of(record["configuration"])
        scores = {f"{e['split']} {e['step']}": e["scores"] for e in record["evaluations"]}
        course = {"steps": record["steps"], "loss": [s["loss"] for s in record["curve"]], "scores": scores}
        name = f"{run.variant} {run.rate:g} {run.seed}"
        found[name] = {"state": record["state"], **(course if run.rate < 1 else {})}
    return dict(sorted(found.items()))


# -- the files


def frozen(name: str) -> Any:
    """Return the content of a file of the oracle."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def differences(found: Any, stored: Any, where: str = "", allowed: float = EXACT) -> list[str]:
    """Return one line for each difference between an output and the frozen one.

    Args:
        found: The output, or a part of it.
        stored: The same part of the frozen output.
        where: The path of the part in the whole output.
        allowed: Largest difference of two numbers, relative for numbers above 1.
    """
    if isinstance(found, Mapping) and isinstance(stored, Mapping):
        keys = sorted({*found, *stored})
        missing = [f"{where}/{key}: in one only" for key in keys if (key in found) != (key in stored)]
        both = [key for key in keys if key in found and key in stored]
        return missing + [d for k in both for d in differences(found[k], stored[k], f"{where}/{k}", allowed)]
    if isinstance(found, list) and isinstance(stored, list) and len(found) == len(stored):
        pairs = enumerate(zip(found, stored, strict=True))
        return [d for i, (one, two) in pairs for d in differences(one, two, f"{where}/{i}", allowed)]
    if type(found) in (int, float) and type(stored) in (int, float):
        if abs(found - stored) <= allowed * max(1.0, abs(stored)):
            return []
    elif found == stored:
        return []
    return [f"{where}: {found!r}, frozen {stored!r}"]


def _rounded(data: Any) -> Any:
    """Return the data with numbers of 8 significant digits, more than a comparison needs."""
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.8g}") if isinstance(data, float) else data


def main() -> None:
    """Write the files that the command line names, or all of them."""
    names = sys.argv[1:] or [*STUDY, "trained"]
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            (folder / name).mkdir()
            if name == "trained":
                train(folder / name)
            elif name == "published":
                as_a_user.succeed(*PUBLISHED, cwd=folder / name)
            else:
                known_truth.make(folder / name, STUDY[name])
            found = trained(folder / name) if name == "trained" else report(name, folder / name)
            (FOLDER / f"{name}.json").write_text(json.dumps(_rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
