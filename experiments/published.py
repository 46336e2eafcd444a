"""The command `published`: the survey's own scores, without training. See `Published`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from orchestrator.study.option import Option, Positive, Text, Words
from orchestrator.study.options import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Published(StoreOptions):
    """What do the published scores of the LoRA survey (arXiv 2601.22708) say by themselves?

        lora-orchestrator published                   all four tasks
        lora-orchestrator published --task gsm8k      one of them
        lora-orchestrator published --overlay STUDY   with your study beside it

    No model is trained or loaded. The command prints verdicts and tables, and writes report.html, pictures
    and summary.json to <output>/published.
    """

    task: Annotated[Words, Option("NAME", commas=True)] = ("gsm8k", "humaneval", "glue", "images")
    """Published tasks to show."""
    noise: Annotated[tuple[Positive, ...], Option("FLOAT")] = (0.48, 1.0)
    """Standard deviations of a score over seeds, in points, for the simulated repetitions of the study."""
    overlay: Text | None = None
    """A study of your own, whose curves are drawn over the published ones by variant; its tasks are shown."""

    def run(self) -> int:
        """Write and print the page, and return the exit code."""
        from orchestrator.analyze.published import show_published

        show_published(self.task, self.noise, self.output, self.store_folder, self.overlay)
        return 0


if __name__ == "__main__":
    from orchestrator.cli.program import main

    main("published")
