"""Forward passes of a language model with a key-value cache, on a GPU as a captured CUDA graph."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.util.errors import format_error

log = logging.getLogger(__name__)

GRAPH_MAX_KEPT_SHARE = 0.75
"""Largest share of rows that a selection may keep if it needs a new CUDA graph, whose capture takes as long
as several decode steps."""


class CachedForward:
    """The forward passes of one batch: one over the prompts, then one for each new token.

    On a CPU the cache grows by a token a step. On a GPU it has its final size from the beginning, so that a
    step always has the same tensors and can be replayed as a CUDA graph.

    Args:
        base_model: The base model, inside a context that activates the lanes.
        max_length: The largest number of tokens of a row, prompt and answer together.
        static: Whether the cache has its final size from the beginning; by default on a GPU only.
    """

    def __init__(self, base_model: BaseModel, max_length: int, static: bool | None = None) -> None:
        model, on_gpu = base_model.model, base_model.device.type == "cuda"
        self._base_model, self._max_length = base_model, max_length
        self._parameters = inspect.signature(type(model).forward).parameters
        self._cache: Any = None
        if on_gpu if static is None else static:
            self._cache = _make_static_cache(model.config, max_length)
        self._is_static = self._cache is not None
        if not self._is_static:
            self._cache = DynamicCache(config=model.config)
        self._uses_graph = self._is_static and on_gpu and base_model.generation.cuda_graphs
        self._graph: CapturedStep | None = None
        self._is_warmed_up = False
        """Whether a step with the present number of rows has run without a graph."""
        self._length = 0
        self._mask: Tensor
        """(rows, length so far) int64; for a static cache (rows, 1, 1, max_length) bool."""
        self._positions: Tensor
        """The position of the last token of each row, (rows, 1) int64."""

    @property
    def max_kept_share(self) -> float:
        """The largest share of rows that `select_rows` should keep to be worth its cost."""
        return GRAPH_MAX_KEPT_SHARE if self._uses_graph else 1.0

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Fill the key-value cache with the prompts, and return the logits that follow them.

        Args:
            ids: Token ids, padded on the left, (rows, length).
            mask: 0 at padding, else 1, (rows, length).

        Returns:
            The logits of the first new token, (rows, vocabulary) float32.
        """
        positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
        logits = self._call(ids, mask, positions)
        if self._is_static:
            # With a mask of four dimensions transformers makes none itself, for which the host would wait.
            mask = pad(mask, (0, self._max_length - mask.shape[1])).bool()[:, None, None]
        self._length, self._mask, self._positions = ids.shape[1], mask, positions[:, -1:]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row.

        Args:
            tokens: Token ids, (rows,).

        Returns:
            The logits of the next token, (rows, vocabulary) float32. The next step may overwrite them.
        """
        self._length += 1
        self._positions = self._positions + 1
        if self._is_static:
            self._mask[..., self._length - 1] = True
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        inputs = tokens[:, None], self._mask, self._positions
        # The first step allocates what later steps use again, which a capture must not do.
        if self._uses_graph and self._is_warmed_up and self._graph is None:
            self._capture(*inputs)
        if self._uses_graph and not self._is_warmed_up:
            self._is_warmed_up = True
            return self._call_and_look_for_waits(*inputs)
        return self._call(*inputs) if self._graph is None else self._graph.replay(*inputs)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, given by their indices, and forget the others."""
        self._graph, self._is_warmed_up = None, False  # frees the memory of the graph first
        self._cache.reorder_cache(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]

    def _call(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the model on tokens, and return the logits of the last position, (rows, vocabulary) float32."""
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        # transformers 5.20 calls the parameter `past_key_values`, 5.24 calls it `cache`.
        inputs["cache" if "cache" in self._parameters else "past_key_values"] = self._cache
        if "position_ids" in self._parameters:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        return self._base_model.model(**inputs).logits[:, -1].float()

    def _call_and_look_for_waits(self, *inputs: Tensor) -> Tensor:
        """Compute a step, and use no graph from now on if the host waited for the device in it.

        A capture of such a step fails, after which PyTorch's allocator cannot be used any more.
        """
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                logits = self._call(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if any("synchronizing CUDA operation" in str(warning.message) for warning in caught):
            self._disable_graphs("the host waits for the GPU in a decode step")
        return logits

    def _disable_graphs(self, reason: str) -> None:
        self._uses_graph = self._base_model.generation.cuda_graphs = False
        log.warning("answers are generated without CUDA graphs, slower: %s", reason)

    def _capture(self, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Capture the step with these inputs as a graph; if that fails, warn and use no graph from now on."""
        try:
            self._graph = CapturedStep(self._call, ids, mask, positions)
        except RuntimeError as error:
            # If memory runs out during a capture, ending the capture may raise a second error. The first
            # error is then its context.
            for one in (error, error.__context__):
                if one is not None and classify_error(one) is Fault.MEMORY:
                    raise one from None
            self._disable_graphs(format_error(error))


class CapturedStep:
    """A decode step as a CUDA graph, for one cache and one number of rows.

    Args:
        call: Computes the logits of a step from token ids, mask and positions.
        ids: Token ids of a step, (rows, 1).
        mask: The mask of that step, (rows, 1, 1, length).
        positions: The position of each token, (rows, 1).
    """

    def __init__(
        self, call: Callable[[Tensor, Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, positions: Tensor
    ) -> None:
        self._inputs = (ids.clone(), mask.clone(), positions.clone())
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Other threads, which copy batches or checkpoints, may call CUDA meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = call(*self._inputs)
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own stream current
            raise

    def replay(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Copy the inputs of a decode step into the captured tensors, and replay the CUDA graph.

        Args:
            ids: The last token id of each row, (rows, 1). All inputs have the shapes of the captured ones.
            mask: The attention mask over the positions of the cache, (rows, 1, 1, length).
            positions: The position of each token in its row, (rows, 1).

        Returns:
            The logits of the next token, (rows, vocabulary); the next call overwrites them.
        """
        for captured, new in zip(self._inputs, (ids, mask, positions), strict=True):
            captured.copy_(new)
        self._graph.replay()
        return self._logits


def _make_static_cache(config: Any, max_length: int) -> StaticCache | None:
    """Return a cache of a fixed size, or None if the steps of the model differ in more than their inputs.

    A layer with a sliding window counts its tokens in Python, and attention other than PyTorch's scaled dot
    product needs a mask of its own form. Falcon with ALiBi derives its biases from a mask without gaps.
    """
    cache = StaticCache(config=config, max_cache_len=max_length)
    is_uniform = all(type(layer) is StaticLayer for layer in cache.layers)
    is_supported = config._attn_implementation == "sdpa" and not getattr(config, "alibi", False)
    return cache if is_uniform and is_supported else None
