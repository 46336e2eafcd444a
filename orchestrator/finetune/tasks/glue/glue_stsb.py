"""STS-B of GLUE (`glue_task.py`): the similarity of two sentences, from 0 to 5."""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Stsb(GlueTask):
    """Prediction of the similarity of two sentences, from 0 to 5."""

    name = "glue_stsb"
    title = "STS-B, nearness of sentences"
    text_columns = ("sentence1", "sentence2")
    output = "regression"
    metric = "pearson"
    floor = 0.0
    defaults = glue_defaults(train=5_120, validation=570, test=1_500)  # 1,600 steps
