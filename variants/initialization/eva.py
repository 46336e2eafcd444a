"""EVA: LoRA from the principal directions of a layer's inputs."""

import torch
from torch import Tensor

from variants import api
from variants.linalg import randomized_svd


class EVA(api.InitTogether, api.RankAllocation, api.Calibrated, api.LowRank):
    """W' = W + s B A with s = alpha / rank, whatever number of ranks a layer has.

    PEFT's option `adjust_scaling_factors`, on by default, has the same effect. The authors' own repository
    divides alpha by the layer's number of ranks.

    Initialization: A = the first principal directions of the layer's inputs, B = 0, so W' = W. Each layer
    proposes its first `rho` * rank directions. Of all proposed directions, the layers * rank that explain the
    largest fraction of their own layer's variance are used. A layer may get no rank. All layers have
    `rho` * rank ranks allocated; a frozen mask hides those that are not in use.

    Principal directions are the right singular vectors of the inputs minus their mean, as in the authors'
    code and PEFT (both use an incremental PCA).
    """

    paper = "Paischer et al., arXiv 2410.07170"
    deviations = """The covariance of all `calibration_batches` batches is decomposed once; the authors' code
    and PEFT update and truncate the decomposition with each batch until the directions converge (`tau`).
    Every position except padding counts; PEFT leaves out the prompt by default. Directions with less than
    about 1e-7 of a layer's variance are lost in a covariance in float32."""
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    calibration_statistic = api.CalibrationStatistic.INPUT_COVARIANCE
    hyperparameters = {
        "calibration_batches": api.Int(64, help="batches whose inputs are decomposed"),
        "rho": api.Number(2.0, minimum=1, help="largest rank of a layer divided by the mean rank"),
    }

    def reduce_calibration(self, layer: api.FrozenLayer, matrix: Tensor) -> api.Params:
        columns = min(_max_rank(layer.settings), len(matrix))
        # All layers use one seed, so that layers with the same inputs tie exactly; the first one then wins.
        _, variance, directions = randomized_svd(matrix, columns, iterations=4, seed=api.stable_seed(columns))
        total = matrix.trace().clamp_min(torch.finfo(matrix.dtype).tiny)
        return {"directions": directions, "shares": variance / total}

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        settings = api.shared_settings(layers)
        shares = [self.calibrated(layer, "shares")[0] for layer in layers.values()]
        if shares[0].is_meta:
            return {name: self._init_layer(layer, settings.rank) for name, layer in layers.items()}
        owner = torch.repeat_interleave(torch.tensor([len(each) for each in shares]))
        largest = torch.cat(shares).cpu().argsort(descending=True, stable=True)
        used = owner[largest[: len(layers) * settings.rank]].bincount(minlength=len(layers))
        return {
            name: self._init_layer(layer, int(rank))
            for (name, layer), rank in zip(layers.items(), used, strict=True)
        }

    def _init_layer(self, layer: api.FrozenLayer, rank: int) -> api.InitialTensors:
        (out_features, in_features), max_rank = layer.shape, _max_rank(layer.settings)
        a = layer.zeros(max_rank, in_features)
        a[:rank] = self.calibrated(layer, "directions")[0][:rank]
        mask = (torch.arange(max_rank) < rank).to(a)
        return api.InitialTensors({"A": a, "B": layer.zeros(out_features, max_rank)}, {api.RANK_MASK: mask})

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        return params["A"], params["B"] * params[api.RANK_MASK].unsqueeze(-2)


def _max_rank(settings: api.VariantSettings) -> int:
    """Return the number of ranks that each layer has allocated."""
    return round(settings.rank * float(settings["rho"]))
