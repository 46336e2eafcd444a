"""RTE: does a text of the news entail a sentence? GLUE (`tasks/glue_task.py`)."""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import Glue, published


class Rte(Glue):
    name = "glue_rte"
    title = "RTE, entailment in the news"
    subset = "rte"
    texts = ("sentence1", "sentence2")
    labels = ("entailment", "not_entailment")
    metric = "accuracy"
    floor = 146 / 277
    defaults = published(train=2_208, validation=240, test=277)  # 690 steps
