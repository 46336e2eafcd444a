"""MNLI: does a premise entail a hypothesis, or contradict it? GLUE (`tasks/glue_task.py`).

The dev set is the matched one, of the genres of train. Ten epochs would be 120,937 steps a run; three are
the default here (`--steps` has the rest).
"""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Mnli(GlueTask):
    name = "glue_mnli"
    title = "MNLI, entailment in ten genres"
    subset = "mnli"
    text_columns = ("premise", "hypothesis")
    dev_split = "validation_matched"
    labels = ("entailment", "neutral", "contradiction")
    metric = "accuracy"
    floor = 3_479 / 9_815
    defaults = glue_defaults(train=387_000, validation=5_000, test=9_815, epochs=3)  # 36,281 steps
