"""MNLI of GLUE (`glue_task.py`): entailment or contradiction of a hypothesis by a premise.

The dev set is the matched one, with the genres of the training set. The study's ten epochs are 120,937 steps
per run. The default here is three epochs; `--steps` changes it.
"""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Mnli(GlueTask):
    """Classification of pairs by entailment."""

    name = "glue_mnli"
    title = "MNLI, entailment in ten genres"
    text_columns = ("premise", "hypothesis")
    dev_split = "validation_matched"
    labels = ("entailment", "neutral", "contradiction")
    floor = 3_479 / 9_815
    defaults = glue_defaults(train=387_000, validation=5_000, test=9_815, epochs=3)  # 36,281 steps
