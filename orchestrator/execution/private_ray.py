"""Optimizations by private names of Ray.

Ray may change or remove these names in any release. Five of them are looked up when they are needed. If one
is missing, a line is logged and Ray's public behaviour is used; docs/architecture.md says what that costs.
Ray is imported inside the functions, because it reads environment variables on import that
`ray_cluster.connect` sets.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


@cache
def look_up(name: str) -> Any:
    """Return a private object of Ray; None, with a line in the log, if this version has none of this name.

    Args:
        name: The object as "module:attribute".
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        import ray

        log.warning("Ray %s has no %s; the study goes on without it", ray.__version__, name)
        return None


def draining_node_ids() -> frozenset[str]:
    """Return the ids of the nodes that Ray drains, for example after `ray drain-node` or a spot notice."""
    get = look_up("ray._private.state:state.get_draining_nodes")
    return frozenset(get() if get else ())


@contextmanager
def without_dashboard() -> Iterator[None]:
    """Make `ray.init` start no dashboard process: `include_dashboard=False` starts it without its page."""
    original = look_up("ray._private.node:Node.start_api_server")
    if original is None:
        yield
        return
    node = look_up("ray._private.node:Node")
    node.start_api_server = lambda self, *arguments, **options: None
    try:
        yield
    finally:
        node.start_api_server = original


def trainer_class() -> Any:
    """Return a light subclass of `DataParallelTrainer`, or `TorchTrainer` where that is not possible.

    `DataParallelTrainer`, the base of `TorchTrainer`, needs no torch, whose import takes two seconds in the
    driver. The subclass leaves out three helper actors, each of which is a process to start before training:
    the cleaner of placement groups (the driver removes them), the manager of Ray Data's datasets (there are
    none), and the coordinator of autoscaling (the driver requests nodes).
    """
    name = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer"
    if look_up(f"{name}._initialize_and_run_controller") is None:
        from ray.train.torch import TorchTrainer

        return TorchTrainer
    base: Any = look_up(name)

    class LightTrainer(base):
        def __init__(self, train_loop: Any, *, torch_config: Any, **options: Any) -> None:
            super().__init__(train_loop, backend_config=torch_config, **options)

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            callbacks = arguments.get("callbacks", ())
            arguments["callbacks"] = [each for each in callbacks if type(each).__name__ not in unused]
            if "scaling_policy" in arguments:
                _leave_coordinator_out(arguments["scaling_policy"])
            return super()._initialize_and_run_controller(**arguments)

    return LightTrainer


def _leave_coordinator_out(policy: Any) -> None:
    """Change a scaling policy of a fixed number of workers so that it registers with no coordinator."""
    kind: Any = type(policy)
    if not hasattr(kind, "_maybe_send_resource_request"):
        return

    class UnregisteredPolicy(kind):
        def after_controller_start(self, train_run_context: Any) -> None:
            """Register nothing."""

        def _maybe_send_resource_request(self) -> None:
            """Send nothing."""

    policy.__class__ = UnregisteredPolicy


@contextmanager
def light_trial_actors(trainable: type, actor_class: type) -> Iterator[Callable[[Any], None]]:
    """Make Ray Tune create its trials' actors from a class that does not import Ray Tune.

    The import takes half of the CPU time of the start of a trial's process. So that no argument of such an
    actor needs it either, Tune's description of a trial is pickled as the trial's id, and its storage as an
    empty text. The actors have no runtime environment, for which Ray starts Python twice, and into which Tune
    puts AWS credentials.

    Args:
        trainable: The subclass of `Trainable` that Tune was given; Tune adds subclasses of its own.
        actor_class: The class to create actors from, with the methods that Tune calls.

    Yields:
        A function to be called with each trial that Tune adds.
    """
    import ray

    actor_cache, trial_info = (
        look_up(f"ray.tune.{name}")
        for name in ("execution.class_cache:_ActorClassCache", "experiment.trial:_TrialInfo")
    )
    if actor_cache is None or trial_info is None:
        yield lambda trial: None
        return
    light: Any = ray.remote(actor_class)
    original = actor_cache.get
    registered = set()

    def get(cache: Any, requested: type) -> Any:
        return light if issubclass(requested, trainable) else original(cache, requested)

    def pickle_as_text(kind: type, to_text: Callable[[Any], str]) -> None:
        if kind not in registered:
            registered.add(kind)
            ray.util.register_serializer(kind, serializer=to_text, deserializer=str)

    actor_cache.get = get
    pickle_as_text(trial_info, lambda info: info.trial_id)
    try:
        yield lambda trial: pickle_as_text(type(trial.storage), lambda storage: "")
    finally:
        actor_cache.get = original
        for kind in registered:
            ray.util.deregister_serializer(kind)
