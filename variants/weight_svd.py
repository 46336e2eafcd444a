"""The base class of variants that start from singular triplets of the weight."""

from typing import ClassVar

import torch
from torch import Tensor

from variants import api
from variants.linalg import randomized_svd


class WeightSVD(api.Calibrated, api.LowRank):
    """A product of factors that starts from the largest or smallest singular triplets of W = U S V^T.

    The triplets are computed once for each base model, rank and `svd`, and do not depend on a lane's seed.
    """

    calibration_statistic = api.CalibrationStatistic.WEIGHT
    hyperparameters = {
        "svd": api.Choice(
            "exact", ("exact",), or_count="a number of power iterations, such as 16",
            help="'exact', or the number of power iterations of a randomized SVD",
        )
    }  # fmt: skip
    smallest: ClassVar[bool] = False
    """True for the smallest triplets, which only an exact SVD finds: such a variant has no `svd`."""

    def triplet_count(self, settings: api.VariantSettings) -> int:
        """Return the number of triplets that `triplets` returns at most; by default the rank."""
        return settings.rank

    def triplets(self, layer: api.FrozenLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (out, r), S (r,) and V^T (r, in), in descending order, in the lanes' dtype."""
        u, s, vh = self.calibrated(layer, "U", "S", "Vh")
        return u, s, vh

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        count, svd = self.triplet_count(layer.settings), str(layer.settings.extra.get("svd", "exact"))
        u, s, vh = (
            torch.linalg.svd(matrix, full_matrices=False)
            if svd == "exact"
            else randomized_svd(matrix, count, int(svd), api.stable_seed(layer.name, count))
        )
        kept = slice(len(s) - count, None) if self.smallest else slice(count)
        return {"U": u[:, kept].contiguous(), "S": s[kept].contiguous(), "Vh": vh[kept].contiguous()}
