"""DeBERTa's disentangled attention (He et al. 2021, arXiv 2006.03654) for rows of several lanes.

transformers projects the table of relative position embeddings once per batch. The layers that project it
carry adapters (in DeBERTa-v3 they also project queries and keys), so each lane needs its own projection. Here
the table is projected for every row, limited to the positions that the batch's length needs: without buckets
at most twice the length. With one lane the numbers equal those of transformers. Dropout of the table also has
a mask per row: its input has the shape (rows, positions, features) instead of (positions, features).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from variants.base_dropout import TableDropout


def patch_deberta_attention(model: nn.Module) -> None:
    """Replace the attention modules of a DeBERTa model, in place."""
    for module in model.modules():
        if isinstance(module, modeling_deberta.DisentangledSelfAttention):
            module.__class__ = PerRowDisentangledSelfAttention
            _replace_position_dropout(module)
        elif isinstance(module, modeling_deberta_v2.DisentangledSelfAttention):
            module.__class__ = PerRowDisentangledSelfAttentionV2
            _replace_position_dropout(module)


def _replace_position_dropout(module: Any) -> None:
    """Make the dropout of the position table a `TableDropout`, since all rows of a batch share the table."""
    if getattr(module, "relative_attention", False):
        module.pos_dropout = TableDropout(module.pos_dropout.p)


class PerRowDisentangledSelfAttention(modeling_deberta.DisentangledSelfAttention):
    """Attention of DeBERTa that projects relative positions for each row."""

    def disentangled_att_bias(
        self, query: Tensor, key: Tensor, relative_pos: Any, rel_embeddings: Tensor, scale_factor: int
    ) -> Any:
        """Compute the scores between contents and relative positions.

        Args:
            query: Scaled queries, (rows, heads, length, head size).
            key: Keys, (rows, heads, length, head size).
            relative_pos: Position of each query minus that of each key, (1, length, length).
            rel_embeddings: The position table, (positions, features), or with a dropout mask per row
                (rows, positions, features).
            scale_factor: The number of kinds of scores. Scores are divided by sqrt(head size * scale_factor).

        Returns:
            Scores to add to those of contents, (rows, heads, length, length).
        """
        rows, _, length, size = query.shape
        middle, span = self.max_relative_positions, min(length, self.max_relative_positions)
        table = rel_embeddings[..., middle - span : middle + span, :].expand(rows, -1, -1)
        c2p_index = _to_gather_index(relative_pos + span, 2 * span).expand(*query.shape[:2], -1, -1)
        p2c_index = _to_gather_index(span - relative_pos, 2 * span).expand(*query.shape[:2], -1, -1)
        score: Any = 0
        if "c2p" in self.pos_att_type:
            keys = self.transpose_for_scores(self.pos_proj(table))
            score = score + torch.gather(query @ keys.transpose(-1, -2), -1, c2p_index)
        if "p2c" in self.pos_att_type:
            queries = self.transpose_for_scores(self.pos_q_proj(table)) / (size * scale_factor) ** 0.5
            score = score + torch.gather(key @ queries.transpose(-1, -2), -1, p2c_index).transpose(-1, -2)
        return score


class PerRowDisentangledSelfAttentionV2(modeling_deberta_v2.DisentangledSelfAttention):
    """Attention of DeBERTa-v2 and -v3 that projects relative positions for each row."""

    def disentangled_attention_bias(
        self, query: Tensor, key: Tensor, relative_pos: Any, rel_embeddings: Tensor, scale_factor: int
    ) -> Any:
        """Compute the scores between contents and relative positions.

        Args:
            query: Queries, (rows * heads, length, head size).
            key: Keys, (rows * heads, length, head size).
            relative_pos: Position of each query minus that of each key, (1, length, length); the number of
                its bucket if the model has buckets.
            rel_embeddings: The position table, (positions, features), or with a dropout mask per row
                (rows, positions, features).
            scale_factor: The number of kinds of scores. Scores are divided by sqrt(head size * scale_factor).

        Returns:
            Scores to add to those of contents, (rows * heads, length, length).
        """
        batch_heads, length, size = query.shape
        heads, span = self.num_attention_heads, self.pos_ebd_size
        # Distances up to half the number of buckets have a bucket each. Longer ones share buckets: then the
        # whole table is needed.
        near = self.position_buckets <= 0 or length - 1 <= self.position_buckets // 2
        reach = min(length - 1, span) if near else span
        table = rel_embeddings[..., span - reach : min(span + reach + 1, 2 * span), :]
        c2p_index = _to_gather_index(relative_pos + reach, table.shape[-2]).expand(batch_heads, -1, -1)
        p2c_index = _to_gather_index(reach - relative_pos, table.shape[-2]).expand(batch_heads, -1, -1)
        rows = table.expand(batch_heads // heads, -1, -1)
        scale = (size * scale_factor) ** 0.5
        score: Any = 0
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            keys = self.transpose_for_scores(project(rows), heads)
            score = score + torch.gather(query @ keys.transpose(-1, -2), -1, c2p_index) / scale
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            queries = self.transpose_for_scores(project(rows), heads)
            p2c_score = torch.gather(key @ queries.transpose(-1, -2), -1, p2c_index) / scale
            score = score + p2c_score.transpose(-1, -2)
        return score


def _to_gather_index(positions: Tensor, size: int) -> Tensor:
    """Return indices for `torch.gather` into a table of `size` positions."""
    return positions.long().clamp(0, size - 1)
