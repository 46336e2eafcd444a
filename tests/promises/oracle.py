"""Five whole outputs, frozen: reports on three studies of known truth and on the published scores; records.

The files in `oracle/` hold what the reports say, in a form of their own: outcomes, best rates, scores with
intervals, states and contrasts by variant. The functions of this file alone know where `summary.json` and a
record have them. After an intended change of the numbers, write the files anew (the last one trains on Ray):

    python tests/promises/oracle.py [study tuned sensitivity published trained]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import as_a_user
import known_truth

FOLDER = Path(__file__).with_name("oracle")
STUDY = {"study": "grid", "tuned": "tuned", "sensitivity": "factors", "published": "published"}
"""Question -> name of the folder with its report."""
PUBLISHED = ("published", "--task", "gsm8k", "glue")
TRAINED = ("--variants", "lora", "pissa", "hira", "--learning-rates", "3e-3", "1e-2", "1e3", "--seeds", "1")
TRAINED_STEPS = ("--steps", "12", "--evaluations", "2", "--widen", "0", "--study", "trained")
EXACT, PROCESSORS = 1e-6, 1e-5
"""Largest distance of a number from the frozen one: of a report, absolute, and of a loss that was trained on
another processor, relative (that of the golden curves)."""


# -- what a report says


def numbers(results: Any) -> dict[str, Any]:
    """Return the numbers of results from `orchestrator.load`, by the names of `summary.json`."""
    return asdict(results.summary)


def _estimate(estimate: Mapping[str, Any] | None) -> list[float | None] | None:
    """Return mean and interval, with None for a missing interval."""
    return None if estimate is None else [estimate["mean"], *_interval(estimate["interval"])]


def _interval(interval: Mapping[str, float] | None) -> list[float | None]:
    return [None, None] if interval is None else [interval["low"], interval["high"]]


def outcomes(summary: Mapping[str, Any]) -> list[str]:
    """Return the outcomes of all verdicts, the most important first."""
    return [verdict["outcome"] for verdict in summary["verdicts"]]


def best(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant the best rate, and mean and interval of its scores there."""
    return {
        curve["variant"]: {
            "best rate": curve["best_rate"],
            "validation": _estimate(curve["best_validation"]),
            "test": _estimate(curve["best_test"]),
        }
        for panel in summary["panels"]
        for curve in panel["curves"]
    }


def rows(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant its score in tunings, its difference from LoRA, and what follows from it."""
    (task,) = summary["comparison"]["tasks"]
    return {
        row["variant"]: {
            "test": _estimate(row["test"]),
            "difference": [row["difference"], *_interval(row["interval"])],
            "outcome": row["outcome"],
            "LoRA matches or beats it": row["counts"],
            "pairs": row["pairs"],
        }
        for row in task["rows"]
        if row["role"] != "baseline"
    }


def reversals(summary: Mapping[str, Any]) -> dict[str, bool | None]:
    """Return for each variant whether its order with LoRA changes with the rate."""
    (task,) = summary["comparison"]["tasks"]
    return {row["variant"]: row["reversal"] for row in task["fixed_rate"]["rows"]}


def effects(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant the loss by each factor set blindly, and with the rate tuned again."""
    (task,) = summary["factor_study"]["tasks"]
    return {
        variant["variant"]: {
            factor["name"]: {
                "set blindly": _estimate(factor["misset"]),
                "tuned again": _estimate(factor["retuned"]),
            }
            for factor in (variant["rate"], *variant["factors"])
        }
        for variant in task["variants"]
    }


def _lost(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each variant what it loses at LoRA's best rate."""
    (panel,) = summary["panels"]
    return {
        c["variant"]: [(lost := c["regret_at_reference_best"])["value"], *_interval(lost["interval"])]
        for c in panel["curves"]
    }


def _published_task(task: Mapping[str, Any]) -> dict[str, Any]:
    variants = {v["variant"]: [v["rank"], v["best_score"], v["best_rates"]] for v in task["variants"]}
    return {
        "rank, best score, best rates": variants,
        "span": [task["span"], task["top_half_span"]],
        "winners": {f"{each['learning_rate']:g}": sorted(each["winners"]) for each in task["winners"]},
        "LoRA's rank in repeats": {f"{each['noise']:g}": each["reference_ranks"] for each in task["noise"]},
    }


def published(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each task of the survey the ranks, spans and winners."""
    return {task["task"]: _published_task(task) for task in summary["tasks"]}


def report(name: str, folder: Path) -> dict[str, Any]:
    """Return what is frozen of a report in `folder/results`."""
    summary = json.loads((folder / "results" / STUDY[name] / "summary.json").read_text())
    found: dict[str, Any] = {"outcomes": outcomes(summary)}
    if name == "published":
        return found | {"tasks": published(summary)}
    found["states"] = summary["states"]
    if name == "tuned":
        return found | {"rows": rows(summary), "reversals": reversals(summary)}
    found["best"] = best(summary)
    return found | ({"lost": _lost(summary)} if name == "study" else {"effects": effects(summary)})


# -- what a trained study leaves


def train(folder: Path) -> None:
    """Train a small study on data of one's own, in `folder/results`."""
    own = known_truth.own_data(folder)
    words = [word for name, value in own.items() for word in (f"--{name}", value)]
    print(as_a_user.succeed("study", *words, *TRAINED, *TRAINED_STEPS, cwd=folder))


def trained(folder: Path) -> dict[str, Any]:
    """Return the records in `folder/results` by variant, rate and seed.

    Of a lane at a rate far too high only the state is frozen, because such a lane magnifies rounding.
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
    """Return one line for each place in which an output differs from the frozen one.

    Args:
        found: The output.
        stored: The frozen output.
        where: The place of both in the whole.
        allowed: Largest distance of two numbers, relative for numbers above 1.
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
    """Return the same with 8 significant digits, which is more than is compared."""
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.8g}") if isinstance(data, float) else data


def main() -> None:
    """Write the files that the command line names, or all."""
    names = sys.argv[1:] or ["study", "tuned", "sensitivity", "published", "trained"]
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
