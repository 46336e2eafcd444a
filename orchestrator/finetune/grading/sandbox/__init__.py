"""Where programs written by a model run; see `orchestrator.finetune.grading.code`."""
