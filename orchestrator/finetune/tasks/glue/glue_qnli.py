"""QNLI of GLUE (`glue_task.py`): sentences that contain the answer to a question or not."""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Qnli(GlueTask):
    """Classification of sentences: those with the answer to a question, and others."""

    name = "glue_qnli"
    title = "QNLI, sentences with the answer"
    text_columns = ("question", "sentence")
    labels = ("entailment", "not_entailment")
    floor = 2_702 / 5_463
    defaults = glue_defaults(train=99_200, validation=5_000, test=5_463)  # 31,000 steps
