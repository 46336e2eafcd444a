"""Classification of WordNet's noun glosses by what they define: 16 classes (animal, act, food, ...).

The classes are WordNet's lexicographer files. The data are those of WordNet 3.0 in Debian's package
`wordnet-base`. The default model is a pretrained sentence encoder.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.examples import split_evenly
from orchestrator.util.errors import UsageError

WORDNET_FOLDER = "/usr/share/wordnet"
"""The folder of Debian's package; WordNet's own variable WNSEARCHDIR sets another one."""
LEXICOGRAPHER_FILES = {
    "act": "04",
    "animal": "05",
    "artifact": "06",
    "attribute": "07",
    "body": "08",
    "cognition": "09",
    "communication": "10",
    "event": "11",
    "food": "13",
    "location": "15",
    "person": "18",
    "plant": "20",
    "possession": "21",
    "state": "26",
    "substance": "27",
    "time": "28",
}
"""The number of the lexicographer file of each class, from lexnames(5WN)."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIN_WORDS = 4
"""Shorter glosses are left out."""


class Glosses(Task):
    """Classification of glosses by what they define."""

    name = "glosses"
    title = "kinds of WordNet glosses"
    metric = "accuracy"
    floor = 0.0625
    default_model = "minilm-l6"
    output = "classification"
    labels = tuple(LEXICOGRAPHER_FILES)
    defaults = TaskDefaults(
        960, 320, 400, steps=60, batch_size=16, max_length=24, evaluations=3, learning_rates=LEARNING_RATES
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return _all_examples(os.environ.get("WNSEARCHDIR", WORDNET_FOLDER))[split][:count]


@lru_cache(maxsize=1)
def _all_examples(folder: str) -> dict[Split, list[Example]]:
    examples = {gloss: Example(gloss, label) for gloss, label in _read_glosses(Path(folder)).items()}
    return split_evenly(examples, Glosses.labels, salt="glosses/")


def _read_glosses(folder: Path) -> dict[str, str]:
    """Return the class of each gloss, without its example sentences.

    Glosses of a few words, and those that two classes share, are left out.
    """
    path = folder / "data.noun"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"Task 'glosses' needs WordNet's {path} ({error.strerror}): apt-get install wordnet-base"
        ) from None
    labels_by_number = {number: label for label, number in LEXICOGRAPHER_FILES.items()}
    found: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("  "):  # the license
            continue
        synset, _, text = line.partition(" | ")
        gloss = text.split('; "')[0].strip()
        if len(gloss.split()) >= MIN_WORDS:
            found.setdefault(gloss, set()).add(synset.split(" ", 2)[1])
    return {
        gloss: labels_by_number[next(iter(numbers))]
        for gloss, numbers in found.items()
        if len(numbers) == 1 and numbers <= labels_by_number.keys()
    }
