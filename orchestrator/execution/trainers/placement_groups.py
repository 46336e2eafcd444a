"""What a killed Train controller leaves behind."""

from __future__ import annotations

from typing import Any


def remove_orphaned_placement_groups() -> None:
    """Removes the placement groups of this Ray job whose creating actor is dead. Ray itself keeps them while
    the job lives, and Train's own cleaner needs the dashboard, which a Ray that was started here lacks."""
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    table: Any = gcs_pb2  # made by protobuf: type checkers see nothing of it
    job = ray.get_runtime_context().get_job_id()
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = table.PlacementGroupTableData.FromString(raw)
        by_an_actor = group.creator_actor_id.strip(b"\xff")
        ours = group.creator_job_id.hex() == job and group.state != table.PlacementGroupTableData.REMOVED
        if ours and by_an_actor and group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
