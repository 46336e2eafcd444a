"""MRPC: do two sentences of the news say the same? GLUE (`tasks/glue_task.py`).

The study scores it by accuracy (others by F1).
"""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Mrpc(GlueTask):
    name = "glue_mrpc"
    title = "MRPC, paraphrases in the news"
    subset = "mrpc"
    text_columns = ("sentence1", "sentence2")
    labels = ("not_equivalent", "equivalent")
    metric = "accuracy"
    floor = 129 / 408
    defaults = glue_defaults(train=3_280, validation=360, test=408)  # 1,025 steps
