"""The sections of a report, in the order in which the page and the terminal show them."""

from __future__ import annotations

from orchestrator.analyze.report_parts import Section
from orchestrator.analyze.sections.adapter_section import ADAPTERS
from orchestrator.analyze.sections.comparison_section import COMPARISON
from orchestrator.analyze.sections.cost_section import COSTS
from orchestrator.analyze.sections.curve_section import CURVES
from orchestrator.analyze.sections.factor_section import FACTORS
from orchestrator.analyze.sections.run_section import RUNS
from orchestrator.analyze.sections.search_section import SEARCH
from orchestrator.analyze.sections.training_section import TRAINING

SECTIONS: tuple[Section, ...] = (FACTORS, COMPARISON, CURVES, SEARCH, ADAPTERS, TRAINING, COSTS, RUNS)
"""The sections. The report shows the verdicts before them and the provenance after them."""
