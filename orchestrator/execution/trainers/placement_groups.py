"""Removal of the placement groups that killed Ray Train controllers leave behind."""

from __future__ import annotations

from orchestrator.execution.ray.private import orphaned_placement_groups


def remove_orphaned_placement_groups() -> None:
    """Remove the placement groups of this Ray job whose creating actor is dead.

    Ray keeps them as long as the job lives. Train's own cleaner needs Ray's dashboard, which a local Ray does
    not have here.
    """
    from ray.util import remove_placement_group

    for group in orphaned_placement_groups():
        remove_placement_group(group)
