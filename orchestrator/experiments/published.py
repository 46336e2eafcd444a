"""What do the published scores of the LoRA survey (arXiv 2601.22708) say by themselves?

    lora-orchestrator published                   all four tasks
    lora-orchestrator published --task gsm8k      one of them
    lora-orchestrator published --overlay STUDY   with your study beside it

No model is trained or loaded. The command prints verdicts and tables, and writes report.html, pictures and
summary.json to <output>/published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.study.study_name import default_output


@dataclass(frozen=True)
class PublishedOptions:
    """Options of the page of published scores."""

    task: tuple[str, ...] = ("gsm8k", "humaneval", "glue", "images")
    """Published tasks to show."""
    noise: tuple[float, ...] = (0.48, 1.0)
    """Standard deviations of a score over seeds, in points, for the simulated repetitions of the study."""
    overlay: str | None = None
    """A study of your own, whose curves are drawn over the published ones by variant; its tasks are shown."""
    output: Path = field(default_factory=default_output)
    """Output folder, in which the page's folder is and the study of --overlay is looked up."""
    store: Path | None = None
    """Folder of the records of --overlay. Default: `store` in the output folder."""


OPTIONS = PublishedOptions


def run(options: PublishedOptions) -> int:
    """Write and print the page, and return the exit code."""
    from orchestrator.analyze.published.published_page import show_published

    show_published(options.task, options.noise, options.output, options.overlay, options.store)
    return 0
