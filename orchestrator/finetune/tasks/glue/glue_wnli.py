"""WNLI of GLUE (`glue_task.py`): the noun that a pronoun refers to.

The dev set repeats sentences of the training set with the other answer, so most models score below the best
constant. The floor is the score of that constant, 0.563, which the untrained head predicts for every text.
"""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Wnli(GlueTask):
    """Classification of pairs of a pronoun and a noun: the pronoun refers to the noun, or not."""

    name = "glue_wnli"
    title = "WNLI, pronouns"
    text_columns = ("sentence1", "sentence2")
    labels = ("not_entailment", "entailment")
    floor = 40 / 71
    defaults = glue_defaults(train=560, validation=60, test=71)  # 175 steps
