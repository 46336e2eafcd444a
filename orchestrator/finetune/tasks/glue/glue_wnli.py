"""WNLI of GLUE (`glue_task.py`): which noun a pronoun refers to.

The dev set repeats sentences of the training set with the other answer, so most models score below the best
constant. The floor is the score of that constant, 0.563, which the untrained head predicts for every text.
"""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Wnli(GlueTask):
    """Classification of whether a pronoun refers to a given noun."""

    name = "glue_wnli"
    title = "WNLI, pronouns"
    subset = "wnli"
    text_columns = ("sentence1", "sentence2")
    labels = ("not_entailment", "entailment")
    metric = "accuracy"
    floor = 40 / 71
    defaults = glue_defaults(train=560, validation=60, test=71)  # 175 steps
