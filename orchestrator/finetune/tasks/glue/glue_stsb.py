"""STS-B: how near are two sentences in meaning, 0 to 5? GLUE (`tasks/glue_task.py`)."""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Stsb(GlueTask):
    name = "glue_stsb"
    title = "STS-B, nearness of sentences"
    subset = "stsb"
    text_columns = ("sentence1", "sentence2")
    output = "regression"
    metric = "pearson"
    floor = 0.0
    defaults = glue_defaults(train=5_120, validation=570, test=1_500)  # 1,600 steps
