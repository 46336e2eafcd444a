"""Which lanes' rows a call of the model computes, and the dropout masks of these lanes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from variants.base import Layer, Params, Settings, Variant, number


class RowsWithoutLane(RuntimeError):
    """An adapted layer was called with rows of which nobody knows the lane."""


@dataclass(eq=False)
class Rows:
    """What a call of the model computes: K lanes' rows, lane-major. `lanes` is empty for the frozen base."""

    lanes: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    micro: int = 0
    rows: int | None = None
    part: tuple[int, int] | None = None
    """(first, of): these are the rows from `first` on of `of` that a lane has on all workers together."""
    real: Tensor | None = None
    """(K*R, L), False at padding."""
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """For the frozen base: the weights of its heads."""
    called: set[str] = field(default_factory=set)
    drawn: dict[str, int] = field(default_factory=dict)
    """Module -> how often its masks were drawn. A model may call a module twice; each call has its own."""
    drawn_again: dict[str, int] | None = None
    """The same in the part of the model that is recomputed in backward (`Board.recomputing`)."""
    read: set[str] = field(default_factory=set)
    prepared: dict[str, tuple[list[int], Params]] = field(default_factory=dict)
    """Without gradients (generation, evaluation) the same parameters serve many calls: a layer's prepared
    ones."""
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (K,), each lane's term of the auxiliary loss."""

    def auxiliary_loss(self) -> Tensor | None:
        """(K,): the mean over layers, or None where the variant has no such loss."""
        return torch.stack(list(self.auxiliary.values())).mean(0) if self.auxiliary else None


class Board:
    """What all adapted layers of a model share."""

    def __init__(self) -> None:
        self.settings: dict[str, Settings] = {}
        self.seeds: dict[str, int] = {}
        self.dropout = 0.0
        self.now: Rows | None = None
        self.latest: Rows | None = None
        self._scalings: dict[Any, Tensor] = {}

    def rows(self, layer: str) -> Rows:
        """Whose rows `layer` is computing; raises RowsWithoutLane."""
        if self.now is not None:
            return self.now
        # Gradient checkpointing calls the model again inside backward, when rows() may be closed already:
        # what is recomputed is the latest call, because a loop goes backward before it goes forward again.
        if self.latest is not None and torch._C._current_graph_task_id() != -1:
            return self.latest
        raise RowsWithoutLane(f"{layer} was called outside rows() and off(): no lane owns these rows")

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a part of the model that starts now, and for its recomputation in backward.

        The recomputation draws the masks that were drawn the first time.
        """
        rows = self.now or self.latest
        return nullcontext(), nullcontext() if rows is None else _drawn_again(rows, dict(rows.drawn))

    def scaling(self, variant: Variant, lanes: tuple[str, ...], like: Layer) -> Tensor:
        """(K, 1, 1)"""
        key = (lanes, like.weight.device, like.dtype)
        if key not in self._scalings:
            factors = [variant.scaling(self.settings[lane]) for lane in lanes]
            made = torch.tensor(factors, dtype=like.dtype, device=like.weight.device)
            self._scalings[key] = made.view(-1, 1, 1)
        return self._scalings[key]

    def changed(self) -> None:
        """Lanes have come or gone."""
        self._scalings.clear()
        self.latest = None


@contextmanager
def _drawn_again(rows: Rows, drawn: dict[str, int]) -> Iterator[None]:
    """Count the masks that are drawn in backward from `drawn` on."""
    rows.drawn_again = drawn
    try:
        yield
    finally:
        rows.drawn_again = None


def _call(name: str, rows: Rows) -> str:
    """Return the module's name and, if the model has called it before, how often. Raises RuntimeError."""
    if torch._C._current_graph_task_id() == -1:
        drawn = rows.drawn
    elif rows.drawn_again is not None:
        drawn = rows.drawn_again
    elif rows.drawn.get(name, 0) > 1:
        raise RuntimeError(
            f"{name} was called {rows.drawn[name]} times, and it is not known which call is recomputed; use "
            "orchestrator.finetune.models.activation_checkpointing in place of another gradient checkpointing"
        )
    else:
        drawn = {}
    before = drawn.get(name, 0)
    drawn[name] = before + 1
    return f"{name} {before}" if before else name


def by_lane(x: Tensor, rows: Rows, layer: str) -> Tensor:
    """x (K*R, ..., features) as (K, N, features); raises RowsWithoutLane."""
    lanes = len(rows.lanes)
    size = lanes * (rows.rows or 1)
    if (lanes > 1 or rows.rows) and (x.dim() < 2 or x.shape[0] % size):
        raise RowsWithoutLane(
            f"{layer} was called with {x.shape[0]} rows, not a multiple of {lanes} lanes x "
            f"{rows.rows or 1} rows: no lane owns the rest"
        )
    return x.reshape(lanes, -1, x.shape[-1])


def masks(x: Tensor, p: float, name: str, rows: Rows, seeds: Mapping[str, int]) -> Tensor:
    """Draw the lanes' dropout masks for one module of the model.

    A mask depends on the lane's seed, its step, the module's name, the micro-batch, and how often the model
    has called the module before. A worker that has a part of a lane's rows draws the mask of all of them and
    keeps its own part.

    Args:
        x: The tensor to apply the masks to, (K, N, features).
        p: The probability of a zero.
        name: The module's path in the model.
        rows: Whose rows they are.
        seeds: Lane -> seed.

    Returns:
        (K, N, features): 0 or 1 / (1 - p).
    """
    assert rows.steps is not None
    call = _call(name, rows)
    like, mine = x[0], slice(None)
    if rows.part is not None and rows.rows is not None:
        first, of = rows.part
        each = x.shape[1] // rows.rows
        like, mine = x.new_empty(of * each, x.shape[2]), slice(first * each, (first + rows.rows) * each)
    found = []
    for lane, step in zip(rows.lanes, rows.steps, strict=True):
        generator = torch.Generator(x.device).manual_seed(number(seeds[lane], step, call, rows.micro))
        mask = torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(1 - p)
        found.append(mask[mine])
    return torch.stack(found)
