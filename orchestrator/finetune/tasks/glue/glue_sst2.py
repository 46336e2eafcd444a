"""SST-2: the mood of a film review's phrase. GLUE (`tasks/glue_task.py`).

Many phrases of train are parts of longer ones there, so the score on the validation that is cut from it is
higher than on the dev set, which has whole sentences of other reviews.
"""

from __future__ import annotations

from orchestrator.finetune.tasks.glue_task import GlueTask, glue_defaults


class Sst2(GlueTask):
    name = "glue_sst2"
    title = "SST-2, moods of film reviews"
    subset = "sst2"
    text_columns = ("sentence",)
    labels = ("negative", "positive")
    metric = "accuracy"
    floor = 428 / 872
    defaults = glue_defaults(train=62_000, validation=5_000, test=872)  # 19,375 steps
