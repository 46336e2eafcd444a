"""Problems of the package reasoning-gym."""

from __future__ import annotations

from typing import Any

from orchestrator.util.errors import require_package


def create_dataset(name: str, size: int, **options: Any) -> Any:
    """Return the first problems of a generator with the seed 0.

    Args:
        name: The generator, which is also the name of the task.
        size: The number of problems.
        options: The options of the generator.

    Raises:
        UsageError: The package is not installed.
    """
    require_package(f"Task {name!r}", "reasoning_gym", "real")
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=size, **options)
