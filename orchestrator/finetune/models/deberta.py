"""DeBERTa's attention for rows of several lanes.

It projects its table of relative positions once for the whole batch, as one row more, by layers that carry
adapters (in DeBERTa-v3 by those that project queries and keys); but each lane projects it its own way. Here
every row projects the positions that its length needs, at most twice its length of them where they are not in
buckets. With one lane the numbers are transformers' own. Where lanes have dropout masks for the table, each
row has its own: (rows, positions, features) instead of (positions, features).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from variants.base_dropout import TableDropout


def patch_deberta_attention(model: nn.Module) -> None:
    """Changes the attention of a DeBERTa in place."""
    for module in model.modules():
        if isinstance(module, modeling_deberta.DisentangledSelfAttention):
            module.__class__ = PerRowDisentangledSelfAttention
            _replace_position_dropout(module)
        elif isinstance(module, modeling_deberta_v2.DisentangledSelfAttention):
            module.__class__ = PerRowDisentangledSelfAttentionV2
            _replace_position_dropout(module)


def _replace_position_dropout(module: Any) -> None:
    """Mark the dropout of the table of positions, which all rows of a batch share."""
    if getattr(module, "relative_attention", False):
        module.pos_dropout = TableDropout(module.pos_dropout.p)


class PerRowDisentangledSelfAttention(modeling_deberta.DisentangledSelfAttention):
    def disentangled_att_bias(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        relative_pos: Any,
        rel_embeddings: Tensor,
        scale_factor: int,
    ) -> Any:
        """query_layer, key_layer: (rows, heads, L, d), the query scaled; to (rows, heads, L, L)."""
        rows, _, length, size = query_layer.shape
        middle, span = self.max_relative_positions, min(length, self.max_relative_positions)
        table = rel_embeddings[..., middle - span : middle + span, :].expand(rows, -1, -1)
        c2p_index = _to_gather_index(relative_pos + span, 2 * span).expand(*query_layer.shape[:2], -1, -1)
        p2c_index = _to_gather_index(span - relative_pos, 2 * span).expand(*query_layer.shape[:2], -1, -1)
        score: Any = 0
        if "c2p" in self.pos_att_type:
            keys = self.transpose_for_scores(self.pos_proj(table))
            score = score + torch.gather(query_layer @ keys.transpose(-1, -2), -1, c2p_index)
        if "p2c" in self.pos_att_type:
            queries = self.transpose_for_scores(self.pos_q_proj(table)) / (size * scale_factor) ** 0.5
            score = score + torch.gather(key_layer @ queries.transpose(-1, -2), -1, p2c_index).transpose(
                -1, -2
            )
        return score


class PerRowDisentangledSelfAttentionV2(modeling_deberta_v2.DisentangledSelfAttention):
    def disentangled_attention_bias(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        relative_pos: Any,
        rel_embeddings: Tensor,
        scale_factor: int,
    ) -> Any:
        """query_layer, key_layer: (rows x heads, L, d); to (rows x heads, L, L)."""
        batch_heads, length, size = query_layer.shape
        heads, span = self.num_attention_heads, self.pos_ebd_size
        # Farther tokens share buckets, up to the last; nearer ones have a position each.
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
            score = score + torch.gather(query_layer @ keys.transpose(-1, -2), -1, c2p_index) / scale
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            queries = self.transpose_for_scores(project(rows), heads)
            p2c_score = torch.gather(key_layer @ queries.transpose(-1, -2), -1, p2c_index) / scale
            score = score + p2c_score.transpose(-1, -2)
        return score


def _to_gather_index(positions: Tensor, size: int) -> Tensor:
    return positions.long().clamp(0, size - 1)
