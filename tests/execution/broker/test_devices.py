"""Broken devices are excluded, and end a study only if no other device trains: the broker's state alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from points import configuration

from orchestrator.execution.broker.actor import Broker
from orchestrator.execution.broker.assignment import MAX_GROUP_FAILURES
from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.devices import MAX_DEVICE_DEATHS, DeviceRegistry
from orchestrator.execution.broker.failure_policy import MAX_TRAINER_FAILURES, ExitKind
from orchestrator.execution.broker.lane_entry import HeldLane, TrainerInfo
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

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
@pytest.mark.parametrize("num_broken", [1, 3, 7])
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


def test_a_device_that_crashes_trainers_with_lanes_of_different_variants_is_excluded() -> None:
    core = BrokerCore()
    devices = core.failure_policy.devices
    devices.admit("sound", ["GPU 1"])
    for variant in ("lora", "hira"):
        core.lease("sound.x", None, 0, 0.0)
        core.submit(variant, configuration(variant), 0.0)
        (lane,) = crash(core, f"of-{variant}", "GPU 0", 1)
        assert lane.variant.name == variant
        (lease,) = core.lease("sound.x", None, 1, 0.0).leases
        core.end_lease("sound.x", lane.fingerprint, lease.attempt, "finished", 0.0)
    assert devices.excluded.keys() == {"GPU 0"}


def test_a_step_on_a_device_clears_it() -> None:
    core = BrokerCore()
    devices = core.failure_policy.devices
    devices.admit("sound", ["GPU 1"])
    core.lease("sound.x", None, 0, 0.0)
    for number in range(3 * MAX_DEVICE_DEATHS):
        devices.admit(f"trainer-{number}", ["GPU 0"])
        core.exchange(f"trainer-{number}.x", {}, number + 1, 0.0)
        core.trainer_exited(f"trainer-{number}", 0.0, ExitKind.FAILED, "killed")
    assert devices.excluded == {}


def test_a_trainer_of_several_workers_is_excluded_as_a_whole_and_only_its_faulty_device_is_named() -> None:
    devices = DeviceRegistry()
    assert devices.admit("trainer-0", ["GPU 0", "GPU 1"]) == {}
    assert not devices.hold("trainer-0", {"GPU 1": "a wrong product"}, True, 0.0)
    assert devices.excluded == {"GPU 1": "a wrong product"}
    assert devices.admit("trainer-1", ["GPU 1", "GPU 2"]) == {"GPU 1": "a wrong product"}
    assert devices.admit("trainer-2", ["GPU 2", "GPU 3"]) == {}


def test_a_holder_is_no_live_trainer_and_its_end_is_no_failure() -> None:
    core = BrokerCore()
    core.submit("t", configuration(), 0.0)
    for number in range(2 * MAX_TRAINER_FAILURES):
        core.failure_policy.devices.admit(f"trainer-{number}", ["GPU 0"])
        core.failure_policy.devices.hold(f"trainer-{number}", {"GPU 0": "broken"}, True, 0.0)
        assert core.counts()["trainers"] == 0
        core.trainer_exited(f"trainer-{number}", 0.0, ExitKind.CRASHED, "killed")
    assert not core.failure_policy.abort_reason


def test_a_holder_ends_at_a_drain_when_no_lane_waits_and_when_the_study_closes(tmp_path: Path) -> None:
    broker, faults = Broker(str(tmp_path), "none"), {"GPU 0": "broken"}
    now = 0.0
    broker.clock = lambda: now  # type: ignore[assignment]

    def ends(trainer_id: str = "trainer-0.x") -> bool:
        return asyncio.run(broker.hold(trainer_id, faults))

    broker.core.submit("t", configuration(), now)
    assert not ends()
    now = 10 * timeouts.IDLE_TRAINER_SECONDS
    assert not ends(), "a lane waits: a trainer that is started in its place would get the device"
    asyncio.run(broker.drain("trainer-0"))
    assert ends()
    assert not ends("trainer-1.x")
    broker.core.lease("trainer-2.x", None, 1, now)
    assert not ends("trainer-1.x")
    now += timeouts.IDLE_TRAINER_SECONDS + 1
    assert ends("trainer-1.x"), "it keeps no machine of an autoscaler for nothing"
    asyncio.run(broker.close())
    assert ends("trainer-3.x")


def test_a_restarted_broker_learns_the_excluded_devices_from_their_holders(tmp_path: Path) -> None:
    restarted = Broker(str(tmp_path), "none")
    asyncio.run(restarted.hold("trainer-0.x", {"GPU 0": "2 trainers died there"}))
    assert asyncio.run(restarted.admit("trainer-1.y", ["GPU 0"])) == {"GPU 0": "2 trainers died there"}
    updates = asyncio.run(restarted.get_updates(0, 0, 0, ""))
    assert (updates["excluded_devices"].keys(), updates["holders"]) == ({"GPU 0"}, {"trainer-0"})


def test_a_restarted_broker_learns_the_devices_from_the_calls_of_their_trainers(tmp_path: Path) -> None:
    restarted = Broker(str(tmp_path), "none")
    devices = restarted.core.failure_policy.devices
    asyncio.run(restarted.lease("sound.x", None, 1, {}, 0, TrainerInfo(("GPU 1",))))
    for name in ("trainer-0", "trainer-1"):
        asyncio.run(restarted.exchange(f"{name}.x", {}, 0, TrainerInfo(("GPU 0",))))
        assert devices.excluded == {}
        asyncio.run(restarted.trainer_exited(name, ExitKind.CRASHED, "CUDA error"))
        asyncio.run(restarted.exchange(f"{name}.x", {}, 0, TrainerInfo(("GPU 0",))))
        assert devices.devices_of(name) == (), "a late call of a trainer that has ended adds no device"
    assert devices.excluded.keys() == {"GPU 0"}


def test_a_gpu_that_crashes_with_lanes_like_those_that_train_elsewhere_is_excluded() -> None:
    """All lanes have one group key, so a new trainer on the broken GPU gets suspects of earlier crashes."""
    core, now, held = BrokerCore(), 0.0, {}
    devices = core.failure_policy.devices
    for seed in range(40):
        core.submit(f"t{seed}", configuration(seed=seed), now)
    for gpu in range(3):
        devices.admit(f"sound{gpu}", [f"GPU {gpu}"])
        core.exchange(f"sound{gpu}.x", {}, 0, now)
        leases = core.lease(f"sound{gpu}.x", None, 4, now).leases
        held[gpu] = {x.configuration.fingerprint: (x.attempt, x.configuration, None) for x in leases}
    for number in range(60):
        now += 20.0
        for gpu, lanes in held.items():
            core.exchange(f"sound{gpu}.x", lanes, int(now), now)
        name = f"broken{number}"
        if devices.admit(name, ["GPU 9"]):
            break
        core.exchange(f"{name}.x", {}, 0, now)
        core.lease(f"{name}.x", None, 4, now)
        core.trainer_exited(name, now, ExitKind.CRASHED, "CUDA error: uncorrectable ECC error")
    assert [*devices.excluded] == ["GPU 9"]
    assert not core.failure_policy.abort_reason


def test_one_death_of_a_trainer_with_several_workers_on_the_cpus_of_a_node_excludes_nothing() -> None:
    registry = DeviceRegistry()
    registry.admit("sound", ["CPU of node A"])
    assert MAX_DEVICE_DEATHS == 2
    assert not registry.on_death(["CPU of node B", "CPU of node B"])
    assert registry.on_death(["CPU of node B", "CPU of node B"])
