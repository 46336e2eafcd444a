"""QQP of GLUE (`glue_task.py`): pairs of questions on Quora, duplicates or not.

The metric is the F1 of `duplicate`, as in the study. The study's ten epochs are 111,875 steps per run. The
default here is three epochs; `--steps` changes it.
"""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Qqp(GlueTask):
    """Classification of pairs of questions as duplicates or not."""

    name = "glue_qqp"
    title = "QQP, duplicate questions"
    text_columns = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")
    metric = "f1"
    floor = 0.0
    defaults = glue_defaults(train=358_000, validation=5_000, test=40_430, epochs=3)  # 33,562 steps
