"""`python -m orchestrator` is the program `lora-orchestrator`, also in a clone that is not installed."""

from __future__ import annotations

from orchestrator.cli.program import main

if __name__ == "__main__":
    main()
