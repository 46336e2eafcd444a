"""Reduce the tasks of the hub in every process of a study to the size of a small data folder.

The text of this file becomes `sitecustomize.py` in a folder of PYTHONPATH, so that Python runs it when a
process starts. SMALL_TASKS has the sizes as JSON: task -> examples for training, validation and test.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from dataclasses import replace

CATALOGUE = "orchestrator.finetune.tasks.catalogue"


class _Shrink(importlib.abc.MetaPathFinder):
    """An import hook that wraps the function which makes tasks, when the catalogue of tasks is imported."""

    def find_spec(self, name, path, target=None):
        if name != CATALOGUE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        exec_module = spec.loader.exec_module

        def exec_and_wrap(module):
            exec_module(module)
            make = module.user_task.make_task
            module.user_task.make_task = lambda name, entry: _shrunk(make(name, entry))

        spec.loader.exec_module = exec_and_wrap
        return spec


def _shrunk(task):
    sizes = json.loads(os.environ["SMALL_TASKS"]).get(task.name)
    if sizes:
        train, validation, test = sizes
        small = replace(task.defaults, train_size=train, validation_size=validation, test_size=test)
        task.defaults = small
        task.max_new_tokens = min(task.max_new_tokens, 8)  # an untrained model never ends an answer
        task.samples = min(task.samples, 2)  # a program takes 0.1 s
    return task


if "SMALL_TASKS" in os.environ:
    sys.meta_path.insert(0, _Shrink())
