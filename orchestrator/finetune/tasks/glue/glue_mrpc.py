"""MRPC of GLUE (`glue_task.py`): pairs of sentences from the news with the same meaning or not.

The metric is accuracy, as in the study; other work reports F1.
"""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Mrpc(GlueTask):
    """Classification of pairs of news sentences as paraphrases or not."""

    name = "glue_mrpc"
    title = "MRPC, paraphrases in the news"
    text_columns = ("sentence1", "sentence2")
    labels = ("not_equivalent", "equivalent")
    floor = 129 / 408
    defaults = glue_defaults(train=3_280, validation=360, test=408)  # 1,025 steps
