"""QNLI of GLUE (`glue_task.py`): whether a sentence contains the answer to a question."""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Qnli(GlueTask):
    """Classification of sentences by whether they answer a question."""

    name = "glue_qnli"
    title = "QNLI, sentences with the answer"
    subset = "qnli"
    text_columns = ("question", "sentence")
    labels = ("entailment", "not_entailment")
    metric = "accuracy"
    floor = 2_702 / 5_463
    defaults = glue_defaults(train=99_200, validation=5_000, test=5_463)  # 31,000 steps
