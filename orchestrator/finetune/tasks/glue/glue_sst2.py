"""SST-2 of GLUE (`glue_task.py`): the sentiment of phrases from film reviews.

Many phrases of the training set are parts of longer ones in it. The score on the validation split, which is
taken from the training set, is therefore higher than on the dev set, which has whole sentences of other
reviews.
"""

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Sst2(GlueTask):
    """Classification of phrases of film reviews by sentiment."""

    name = "glue_sst2"
    title = "SST-2, moods of film reviews"
    text_columns = ("sentence",)
    labels = ("negative", "positive")
    floor = 428 / 872
    defaults = glue_defaults(train=62_000, validation=5_000, test=872)  # 19,375 steps
