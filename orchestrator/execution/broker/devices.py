"""The devices of the trainers' workers, and the exclusion of broken ones, as a state machine without I/O.

A device is named by a text, for example "GPU 3 of node 10.0.0.7 (1f2e3d4c)". A trainer of several workers has
several devices. A trainer that is given an excluded device trains nothing and keeps the device reserved, so
that Ray gives it to no other trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.util import timeouts

MAX_DEVICE_DEATHS = 2
"""Number of deaths of trainers on a device, without a step in between, after which it is excluded."""


class DeviceRegistry:
    """Count the deaths of trainers on each device, and exclude devices that are broken.

    A device is excluded if a worker's test of it fails. It is also excluded after MAX_DEVICE_DEATHS deaths
    without a step in between, if a trainer runs on devices without such deaths at that time; if none does,
    the cause is probably not the device.
    """

    def __init__(self) -> None:
        self.excluded: dict[str, str] = {}
        """Excluded device -> reason."""
        self.holders: dict[str, float] = {}
        """Name of a trainer that keeps excluded devices reserved -> the last time at which a lane waited."""
        self._devices: dict[str, tuple[str, ...]] = {}
        """Name of a trainer that has started and not ended -> its devices."""
        self._deaths: Counter[str] = Counter()
        """Device -> deaths of trainers on it since a trainer last took a step there."""

    def devices_of(self, trainer_name: str) -> tuple[str, ...]:
        """Return the devices of a trainer's workers; empty if they are unknown."""
        return self._devices.get(trainer_name, ())

    def admit(self, trainer_name: str, devices: Sequence[str]) -> dict[str, str]:
        """Record the devices of a trainer that starts.

        Args:
            trainer_name: The trainer's name.
            devices: The names of its workers' devices.

        Returns:
            Device -> reason, for those of the devices that are excluded.
        """
        self._devices[trainer_name] = tuple(devices)
        return {device: self.excluded[device] for device in devices if device in self.excluded}

    def hold(self, trainer_name: str, faults: Mapping[str, str], is_waiting: bool, now: float) -> bool:
        """Exclude the devices that a trainer has found faulty and keeps reserved.

        The trainer repeats the call, because a broker that restarts has forgotten the devices.

        Args:
            trainer_name: The trainer's name.
            faults: Faulty device -> reason.
            is_waiting: True if a lane waits for a trainer.
            now: Time on the broker's clock.

        Returns:
            True if the trainer shall end, because no lane has waited for IDLE_TRAINER_SECONDS: no trainer
            will be started in its place.
        """
        for device, reason in faults.items():
            self.excluded.setdefault(device, reason)
        last = self.holders.get(trainer_name, now)
        self.holders[trainer_name] = now if is_waiting else last
        return now - self.holders[trainer_name] > timeouts.IDLE_TRAINER_SECONDS

    def on_step(self, trainer_name: str) -> None:
        """Note that a trainer has taken an optimizer step: its devices work."""
        for device in self.devices_of(trainer_name):
            self._deaths.pop(device, None)

    def on_exit(self, trainer_name: str) -> None:
        """Forget a trainer that has ended."""
        self._devices.pop(trainer_name, None)
        self.holders.pop(trainer_name, None)

    def on_death(self, devices: Sequence[str]) -> bool:
        """Count the death of a trainer against its devices, and exclude those that are probably broken.

        Args:
            devices: The devices of the trainer's workers.

        Returns:
            True if a device was excluded.
        """
        self._deaths.update(set(devices))  # several workers on the CPUs of a node have one device
        broken = [device for device in devices if self._deaths[device] >= MAX_DEVICE_DEATHS]
        if not broken or not self.has_sound_trainer():
            return False
        reason = f"{MAX_DEVICE_DEATHS} trainers died there without a step, while another device was in order"
        self.excluded |= dict.fromkeys(broken, reason)
        return True

    def has_sound_trainer(self) -> bool:
        """Return whether a trainer has only devices on which no trainer has died since the last step there.

        A trainer that keeps excluded devices reserved does not count.
        """
        return any(
            not any(self._deaths[device] for device in devices)
            for name, devices in self._devices.items()
            if name not in self.holders
        )
