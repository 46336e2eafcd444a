"""QQP: do two questions on Quora ask the same? GLUE (`tasks/glue_task.py`).

The study scores it by the F1 of `duplicate`. Its ten epochs would be 111,875 steps a run; three are the
default here (`--steps` has the rest).
"""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Qqp(GlueTask):
    name = "glue_qqp"
    title = "QQP, duplicate questions"
    subset = "qqp"
    text_columns = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")
    metric = "f1"
    floor = 0.0
    defaults = glue_defaults(train=358_000, validation=5_000, test=40_430, epochs=3)  # 33,562 steps
