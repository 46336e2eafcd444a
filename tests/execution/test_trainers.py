"""How many trainers are started for the waiting lanes and the present nodes, and what their ends mean."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from session_settings import make_session

from orchestrator.execution import trainers
from orchestrator.execution.broker import ExitKind, TrainerPlace, Updates
from orchestrator.execution.ray_cluster import Cluster, Node
from orchestrator.execution.settings import shared_options
from orchestrator.execution.trainers import TrainerPool, TrainerRun, classify_end
from orchestrator.study.options import StudyOptions

PLACE = TrainerPlace(("n0",), "GPU 0 of node 10.0.0.7 (1f2e3d4c)", None)


@dataclass
class Machine:
    """What a pool sees of Ray, and the names of the trainers that it starts."""

    gpus: int
    free: int
    started: list[str] = field(default_factory=list)
    requested: list[int] = field(default_factory=list)


def make_pool(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    count: int,
    *,
    running: int = 0,
    elastic: bool = True,
    is_first: bool = False,
    local: bool = False,
) -> TrainerPool:
    """Return a pool of trainers with four lanes and one GPU each."""
    cluster = Cluster(tuple(Node(4, 1, 2.0**33) for _ in range(machine.gpus)), "space", local=local)
    session = make_session(count, 4, 1.0, cluster=cluster, elastic=elastic)
    pool = TrainerPool(session, None)
    pool._last_node_count = float("inf")
    for number in range(running):
        run = TrainerRun(f"trainer-{number}", number, (), session.settings, "space")
        monkeypatch.setattr(run, "is_alive", lambda: True)
        pool.running[run.name] = run
    pool.num_started, pool.had_waiting_lanes = (0 if is_first else running + 1), True
    monkeypatch.setattr(
        TrainerRun,
        "start",
        lambda self: setattr(self, "is_alive", lambda: True) or machine.started.append(self.name),
    )
    monkeypatch.setattr(trainers.ray, "available_resources", lambda: {"GPU": machine.free, "CPU": 99.0})
    monkeypatch.setattr(
        trainers, "placement_group", lambda bundles: machine.requested.append(len(bundles)) or bundles
    )
    return pool


def poll(pool: TrainerPool, waiting: int, training: int = 0, placed: int = 0, **more: Any) -> None:
    places = {f"trainer-{number}": PLACE for number in range(placed)}
    counts = Counter({"waiting": waiting, "leased": training, "trainers": placed})
    pool.update(Updates(counts=counts, places=places, **more))


@pytest.mark.parametrize(
    ("gpus", "free", "pool", "waiting", "started", "requested"),
    [
        (2, 2, {"count": 2, "is_first": True}, 0, 2, 0),  # the first trainers start at once
        (2, 0, {"count": 2, "is_first": True}, 0, 0, 1),  # another study holds all GPUs
        (0, 0, {"count": 1, "is_first": True}, 0, 0, 1),  # an autoscaler acts on this
        (3, 2, {"count": 1, "running": 1}, 16, 2, 0),  # two nodes joined; room for more is requested later
        (3, 2, {"count": 1, "running": 1}, 4, 1, 0),  # as many as the waiting lanes fill
        (1, 0, {"count": 3, "running": 2}, 16, 0, 4),  # a node was lost, its trainer has not ended yet
        (1, 0, {"count": 1, "running": 1}, 16, 0, 4),  # as the waiting lanes fill
        (8, 7, {"count": 2, "running": 1, "elastic": False}, 16, 1, 0),  # a fixed number
        (1, 0, {"count": 3, "running": 1, "elastic": False}, 16, 0, 2),  # it waits for nodes
    ],
)
def test_trainers_start_where_there_is_room_and_nodes_are_requested_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    free: int,
    pool: dict[str, Any],
    waiting: int,
    started: int,
    requested: int,
) -> None:
    machine = Machine(gpus, free)
    running = pool.get("running", 0)
    poll(make_pool(monkeypatch, machine, **pool), waiting, 4 * running, placed=running)
    assert len(machine.started) == started
    assert machine.requested == [1] * requested


def test_no_request_takes_the_room_of_a_trainer_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(monkeypatch, machine := Machine(2, 0), 4, running=2)
    removed: list[Any] = []
    monkeypatch.setattr(trainers, "remove_placement_group", removed.append)
    monkeypatch.setattr(trainers, "placement_group_table", lambda group: {"state": "PENDING"})
    poll(pool, 16, 4, placed=1)
    assert (machine.requested, pool.requests) == ([], [])
    poll(pool, 16, 8, placed=2)
    assert machine.requested == [1] * len(pool.requests) == [1] * 4
    poll(pool, 16, 4, placed=1)
    assert (len(removed), pool.requests) == (4, [])


counts = st.integers(0, 6)


@given(gpus=counts, running=counts, waiting=st.integers(1, 60), free=counts)
def test_never_more_trainers_than_room(gpus: int, running: int, waiting: int, free: int) -> None:
    machine = Machine(gpus, free)
    with pytest.MonkeyPatch.context() as monkeypatch:
        pool = make_pool(monkeypatch, machine, 3, running=running)
        poll(pool, waiting, 4 * running, placed=running)
        assert len(machine.started) <= min(free, max(0, gpus - running))
        assert len(machine.started) * 4 < waiting + 4
        if not running and free and gpus:
            assert machine.started, "lanes wait, and there is room"


def end(pool: TrainerPool, name: str, kind: ExitKind, reason: str, *, held: int = 0, **more: Any) -> None:
    """Let a trainer end, and answer for the broker how many lanes it held."""

    class Answer:
        def remote(self, *arguments: object) -> int:
            return held

    class FakeBroker:
        trainer_exited = Answer()

    pool.broker = FakeBroker()
    run = pool.running.pop(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainers.ray, "get", lambda answer, timeout: answer)
        monkeypatch.setattr(trainers, "remove_placement_group", lambda group: None)
        pool._handle_end(run, kind, reason, Updates(**more))


def test_a_slot_that_failed_twice_before_a_step_is_closed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    pool = make_pool(monkeypatch, Machine(2, 0), 2, running=2, local=True)
    pool.notify, pool.places = lines.append, {"trainer-1": PLACE}
    for _ in range(2):
        end(pool, "trainer-1", ExitKind.FAILED, "a matrix product is wrong")
        pool.running["trainer-1"] = TrainerRun("trainer-1", 1, (), pool.settings, "space")
    assert pool.open_slots == [0]
    assert lines[-1].endswith(f"the last on {PLACE.device}: a matrix product is wrong")
    assert not pool.failure_reason
    for _ in range(2):
        end(pool, "trainer-0", ExitKind.CRASHED, "killed")
        pool.running["trainer-0"] = TrainerRun("trainer-0", 0, (), pool.settings, "space")
    assert pool.open_slots == []
    assert f"{PLACE.device}: a matrix product is wrong; killed" in pool.failure_reason


def test_lanes_that_crash_their_only_trainer_close_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(monkeypatch, Machine(2, 0), 2, running=2, local=True)
    pool.notify = lambda line: None

    def crash(**more: Any) -> None:
        end(pool, "trainer-1", ExitKind.CRASHED, "killed", held=4, **more)
        pool.running["trainer-1"] = TrainerRun("trainer-1", 1, (), pool.settings, "space")

    for _ in range(9):
        crash()
    assert pool.open_slots == [0, 1]
    crash(steps_taken={"trainer-0": 7})  # another trainer trains, so the device may be broken
    crash(steps_taken={"trainer-1": 3, "trainer-0": 7})  # a step: it is not
    crash(steps_taken={"trainer-0": 7})
    assert pool.open_slots == [0, 1]
    crash(steps_taken={"trainer-0": 7})
    assert pool.open_slots == [0]


def test_nodes_that_come_and_go_open_the_slots_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(monkeypatch, Machine(2, 0), 2)
    pool.failures = {0: ["broken", "broken"]}
    nodes = tuple(Node(4, 1, 2.0**33, f"n{number}") for number in range(3))
    monkeypatch.setattr(trainers, "usable_nodes", lambda: nodes)
    assert pool.open_slots == [1]
    pool._count_nodes()
    assert pool.open_slots == [0, 1, 2]
    assert pool.cluster == Cluster(nodes, "space", local=False)


@pytest.mark.parametrize(
    ("error", "place", "announced", "kind", "reason"),
    [
        (None, PLACE, None, ExitKind.DONE, ""),
        (ValueError("x"), PLACE, (ExitKind.FAILED, "a data file"), ExitKind.FAILED, "a data file"),
        (
            WorkerGroupError("died", {0: RuntimeError("it was killed")}),
            PLACE,
            None,
            ExitKind.CRASHED,
            "killed",
        ),
        (
            WorkerGroupError("died", {0: OutOfMemoryError("running low on memory")}),
            PLACE,
            None,
            ExitKind.CRASHED,
            "short of memory",
        ),
        (  # the other workers fail after the death of one
            WorkerGroupError(
                "-", {0: RuntimeError("closed by peer"), 1: ActorUnavailableError("its worker died", None)}
            ),
            PLACE,
            (ExitKind.FAILED, "closed by peer"),
            ExitKind.CRASHED,
            "its worker died",
        ),
        (ControllerError(TimeoutError("no place")), None, None, ExitKind.LOST, "no room"),
        (ControllerError(RuntimeError("a callback")), None, None, ExitKind.FAILED, "a callback"),
        (ValueError("x"), None, (ExitKind.FAILED, "closed by peer"), ExitKind.FAILED, "closed by peer"),
        (ActorUnavailableError("the controller", None), None, None, ExitKind.FAILED, "the controller"),
    ],
)
def test_the_end_of_a_trainer_has_a_kind_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, error: Any, place: Any, announced: Any, kind: ExitKind, reason: str
) -> None:
    monkeypatch.setattr(trainers, "is_lost", lambda node: False)
    found, why = classify_end(error, place, announced)
    assert found is kind
    assert reason in why
    assert "\n" not in why
    monkeypatch.setattr(trainers, "is_lost", lambda node: True)
    if error is not None:
        assert classify_end(error, place, announced, ["n0"])[0] is ExitKind.LOST, "nobody's fault"


@dataclass(frozen=True, kw_only=True)
class MoreOptions(StudyOptions):
    more: int = 0


def test_trainers_get_the_options_without_the_password_of_a_tracking_server() -> None:
    options = MoreOptions(more=2, gradient_checkpointing=True, tracking_uri="https://me:secret@host")
    shared = shared_options(options)
    assert shared == StudyOptions(gradient_checkpointing=True)
    assert b"secret" not in pickle.dumps(shared)
