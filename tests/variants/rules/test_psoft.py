"""PSOFT, against the rotation of W's principal part."""

from __future__ import annotations

import torch
from rule import check_update

from variants.api import VariantSettings


def test_the_principal_part_is_rotated_and_scaled() -> None:
    def change(params, weight, settings, s):
        rank = settings.rank
        q, (rows, columns) = weight.new_zeros(rank, rank), torch.triu_indices(rank, rank, 1)
        q = q.index_put((rows, columns), params["Q"])
        q, eye = q - q.T, torch.eye(rank, dtype=weight.dtype)
        rotation = (eye + q) @ torch.inverse(eye - q)
        u, singular_values, vh = torch.linalg.svd(weight)
        ours = params["US"] @ params["Vh"]
        torch.testing.assert_close(ours, u[:, :rank] * singular_values[:rank] @ vh[:rank], rtol=0, atol=1e-5)
        scaled = torch.diag(params["b"]) @ rotation @ torch.diag(params["a"])
        return params["US"] @ scaled @ params["Vh"] - ours

    check_update("psoft", change, settings=VariantSettings(4))
