"""Packages that are installed by an extra of this project only, and how to install them."""

from __future__ import annotations

from importlib.util import find_spec

from orchestrator.util.errors import UsageError


def install_hint(extra: str) -> str:
    """Return the command that installs an extra from the clone of this project.

    The project is on no package index, so a package of this name there would be someone else's.

    Args:
        extra: Name of the extra in pyproject.toml, such as "wandb".
    """
    return f"in the clone of this project, pip install -c constraints.txt -e '.[{extra}]'"


def require_package(user: str, package: str, extra: str, otherwise: str = "") -> None:
    """Check that a package of an extra is installed, without importing it.

    Args:
        user: What needs the package, for the error: a model, a task, an option.
        package: Name of the package, as it is imported.
        extra: The extra that installs it.
        otherwise: What to do without it, for the end of the error.

    Raises:
        UsageError: The package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name, such as W&B's, is no package
        end = f"; {otherwise}" if otherwise else ""
        raise UsageError(f"{user} needs {package}, which is not installed: {install_hint(extra)}{end}")
