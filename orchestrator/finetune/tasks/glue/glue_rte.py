"""RTE of GLUE (`glue_task.py`): the entailment of a sentence by a text from the news."""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Rte(GlueTask):
    """Classification of pairs of news texts by entailment."""

    name = "glue_rte"
    title = "RTE, entailment in the news"
    text_columns = ("sentence1", "sentence2")
    labels = ("entailment", "not_entailment")
    floor = 146 / 277
    defaults = glue_defaults(train=2_208, validation=240, test=277)  # 690 steps
