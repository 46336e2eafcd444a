"""Broken devices are excluded, and end a study only if no other device trains: the broker's state alone."""

from __future__ import annotations

import random

import pytest
from points import configuration

from orchestrator.execution.broker.assignment import MAX_GROUP_FAILURES
from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.devices import MAX_DEVICE_DEATHS
from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.broker.lane_entry import HeldLane
from orchestrator.study.configuration import Configuration

HOURS, RESTART_SECONDS, STEP_SECONDS, REPORT_STEPS = 3, 15, 5, 10_000  # the first report comes after hours


class Machines:
    """Simulated GPUs, each with a trainer that the driver starts again 15 s after its death."""

    def __init__(self, num_gpus: int, broken: set[int]) -> None:
        self.core, self.broken, self.now, self.number = BrokerCore(), broken, 0.0, 0
        self.devices = self.core.failure_policy.devices
        for number in range(num_gpus):
            self.core.submit(f"t{number}", configuration(rate=1e-3 * (number + 1)), 0.0)
        self.trainers: dict[int, str] = {}
        """Names of the trainers that train or start, by GPU."""
        self.held: dict[str, dict[str, HeldLane]] = {}
        self.steps: dict[str, int] = {}
        self.num_deaths = 0

    def start_trainer(self, gpu: int) -> None:
        name, self.number = f"trainer-{self.number}", self.number + 1
        faults = self.devices.admit(name, [f"GPU {gpu}"])
        if faults:
            self.devices.hold(name, faults, True, self.now)
            return
        self.trainers[gpu] = name
        self.held[name], self.steps[name] = {}, 0

    def train(self, name: str) -> None:
        """Lease a lane if the trainer has none, and take a step of it."""
        trainer_id = f"{name}.x"
        self.core.exchange(trainer_id, self.held[name], self.steps[name], self.now)
        if not self.held[name]:
            for lease in self.core.lease(trainer_id, None, 1, self.now).leases:
                self.held[name][lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)
        self.steps[name] += bool(self.held[name])

    def run(self, seconds: float, first_step_after: float = 0.0) -> None:
        """Simulate until the time is over or the study would end."""
        end, order = self.now + seconds, random.Random(0)
        while self.now < end and not self.core.failure_policy.abort_reason:
            self.now += STEP_SECONDS
            gpus = list(range(len(self.core.open_entries)))
            order.shuffle(gpus)
            for gpu in gpus:
                name = self.trainers.get(gpu)
                if name is None:
                    if f"GPU {gpu}" not in self.devices.excluded:
                        self.start_trainer(gpu)
                elif gpu not in self.broken:
                    if self.now >= first_step_after:
                        self.train(name)
                    else:
                        self.core.lease(f"{name}.x", "another group key", 0, self.now)
                elif self.now % RESTART_SECONDS < STEP_SECONDS:
                    self.core.trainer_exited(self.trainers.pop(gpu), self.now, ExitKind.FAILED, "CUDA")
                    self.num_deaths += 1
            self.core.tick(self.now)


@pytest.mark.parametrize("first_step_after", [0.0, 2400.0])
@pytest.mark.parametrize("num_broken", [1, 7])
def test_broken_gpus_are_excluded_and_the_others_train_for_hours(
    num_broken: int, first_step_after: float
) -> None:
    machines = Machines(8, set(range(num_broken)))
    machines.run(HOURS * 3600, first_step_after)
    assert not machines.core.failure_policy.abort_reason
    assert machines.devices.excluded.keys() == {f"GPU {gpu}" for gpu in range(num_broken)}
    assert machines.num_deaths == MAX_DEVICE_DEATHS * num_broken
    assert sum(machines.steps.values()) > 0


def test_a_study_ends_soon_if_all_devices_are_broken() -> None:
    machines = Machines(8, set(range(8)))
    machines.run(HOURS * 3600)
    assert "without taking a step" in machines.core.failure_policy.abort_reason
    assert machines.now < 600


@pytest.mark.parametrize("num_gpus", [2, 8])
def test_trainers_that_repeat_their_first_steps_for_ever_end_the_study(num_gpus: int) -> None:
    core, machines = BrokerCore(), 0
    core.submit("t", configuration(), 0.0)
    while not core.failure_policy.abort_reason:
        for gpu in range(num_gpus):
            name, machines = f"trainer-{machines}", machines + 1
            assert core.failure_policy.devices.admit(name, [f"GPU {gpu}"]) == {}
            core.exchange(f"{name}.x", {}, 2, 0.0)
            core.trainer_exited(name, 0.0, ExitKind.FAILED, "the same error")
        assert machines < 100, "this would go on for ever"
    assert "no lane got any further" in core.failure_policy.abort_reason


def crash(core: BrokerCore, name: str, device: str, lanes: int) -> list[Configuration]:
    """Let a trainer lease lanes and crash on a device. Returns the lanes."""
    core.failure_policy.devices.admit(name, [device])
    grant = core.lease(f"{name}.x", None, lanes, 0.0)
    core.trainer_exited(name, 0.0, ExitKind.CRASHED, "SIGSEGV")
    return [lease.configuration for lease in grant.leases]


def test_a_variant_that_crashes_every_trainer_costs_no_device() -> None:
    core = BrokerCore()
    devices = core.failure_policy.devices
    devices.admit("sound", ["GPU 1"])
    core.lease("sound.x", None, 0, 0.0)
    for seed in range(12):
        core.submit(f"t{seed}", configuration("hira", seed=seed), 0.0)
    for number in range(30):
        crash(core, f"trainer-{number}", "GPU 0", 4)
    assert core.failures_by_group.total() > MAX_GROUP_FAILURES
    assert devices.excluded == {}
