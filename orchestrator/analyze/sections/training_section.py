"""The section of the training curves: loss over optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analyze.loss_lines import loss_panels
from orchestrator.analyze.report_parts import Picture, ReportData, Section


def _pictures(data: ReportData) -> Sequence[Picture]:
    from orchestrator.analyze.interactive import plotly_losses
    from orchestrator.analyze.plots import loss_curves

    panels = loss_panels(data.summary, data.records)
    if not panels:
        return ()
    losses = Picture(
        "training",
        alt="Training loss of each variant over the steps, at its best learning rate and at the next ones",
        draw=lambda: loss_curves.draw_losses(panels),
        interactive=lambda: plotly_losses.loss_figures(panels),
    )
    return (losses,)


TRAINING = Section("training", "Training curves", pictures=_pictures)
