"""CoLA of GLUE (`glue_task.py`): acceptable and unacceptable English sentences."""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Cola(GlueTask):
    """Classification of sentences as acceptable English or not."""

    name = "glue_cola"
    title = "CoLA, acceptable sentences"
    text_columns = ("sentence",)
    labels = ("unacceptable", "acceptable")
    metric = "matthews"
    floor = 0.0
    defaults = glue_defaults(train=7_600, validation=850, test=1_043)  # 2,375 steps
