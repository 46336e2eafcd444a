"""Uni-LoRA: one vector fills the factors of all layers."""

import torch
from torch import Tensor

from variants import api


class UniLoRA(api.InitTogether, api.SharedTensors, api.LowRank):
    """W' = W + B A, where each entry of A and B is an entry of one trainable vector theta over sqrt(n).

    "IA" (rank, in) and "IB" (out, rank) hold the place in theta (length,) of each entry. n is the number of
    entries of A and B, over all layers, that share a place, so the map from theta to them keeps lengths.
    "norm" (length,) is 1 / sqrt(n). There is no alpha.

    Initialization: theta from U(-0.02, 0.02), so W' differs from W. Places are random, and n differs by at
    most 1 between them.

    Source: `tuners/unilora/` of PEFT, with its defaults.
    """

    paper = "Li et al., arXiv 2506.00799"
    deviations = """A lane draws the places from its own seed, while PEFT has one `proj_seed` for all. The
    places are part of the checkpoint and of the export."""
    hyperparameters = {"length": api.Int(256, help="length of theta: the number of trainable values")}
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    uses_alpha = False
    start = api.Start.OTHER
    typical_lr_scale = 10.0
    one_group = "uni_lora"
    peft = api.PeftMethod(
        "UNILORA",
        {"IA": "unilora_indices_A", "IB": "unilora_indices_B"},
        group_names={"theta": "unilora_theta_d"},
        dropout="unilora_dropout",
        fields={"length": "theta_d_length"},
        constants={"save_indices": True},
    )

    def init_layer_group(self, layers: api.Layers, random: api.LayerRandom) -> api.InitialTensors:
        length = api.shared_settings(layers)["length"]
        return api.InitialTensors({"theta": random.uniform("theta", (length,), 0.02)})

    def init_layers(self, layers: api.Layers, random_of: api.RandomOf) -> dict[str, api.InitialTensors]:
        settings = api.shared_settings(layers)
        rank, length = settings.rank, settings["length"]
        sizes = [rank * side for layer in layers.values() for side in layer.shape]
        generator = random_of(next(iter(layers))).generator("places")
        places = torch.randperm(sum(sizes), generator=generator).remainder_(length).int()
        norm = torch.bincount(places, minlength=length).clamp_(min=1).double().rsqrt()
        pieces = iter(places.split(sizes))
        initial = {}
        for name, layer in layers.items():
            tensors = {"IB": next(pieces).view(-1, rank), "IA": next(pieces).view(rank, -1)}
            frozen = {key: tensor.to(layer.device) for key, tensor in tensors.items()}
            initial[name] = api.InitialTensors({}, {**frozen, "norm": norm.to(layer.device, layer.dtype)})
        return initial

    def factors(self, params: api.Params, layer: api.FrozenLayer) -> tuple[Tensor, Tensor]:
        values = params["theta"] * params["norm"]
        return _take(values, params["IA"]), _take(values, params["IB"])

    def to_peft(self, params: api.Params, layer: api.FrozenLayer) -> dict[str, Tensor]:
        tensors = {}
        for factor in "AB":
            tensors[f"unilora_indices_{factor}"] = params[f"I{factor}"].long()
            tensors[f"unilora_scales_{factor}"] = _take(params["norm"], params[f"I{factor}"])
        return tensors

    def init_from_peft(self, tensors: api.Params, settings: api.VariantSettings) -> api.InitialTensors:
        norm = tensors["unilora_scales_A"].new_ones(settings["length"])  # 1 where the layer has no entry
        frozen = {"norm": norm}
        for factor in "AB":
            places = tensors[f"unilora_indices_{factor}"]
            norm[places] = tensors[f"unilora_scales_{factor}"]
            frozen[f"I{factor}"] = places.int()
        return api.InitialTensors({}, frozen)

    def init_group_from_peft(self, tensors: api.Params, settings: api.VariantSettings) -> api.InitialTensors:
        return api.InitialTensors({"theta": tensors["unilora_theta_d"]})


def _take(values: Tensor, places: Tensor) -> Tensor:
    """Return the entries of values (..., length) at places (..., n, m).

    The gradient of an index adds in a fixed order on a GPU too, which that of `gather` does not.
    """
    lanes = values.view(-1, values.shape[-1])
    first = torch.arange(len(lanes), dtype=places.dtype, device=places.device) * values.shape[-1]
    flat = places.view(len(lanes), -1) + first.unsqueeze(1)
    return lanes.flatten()[flat].view(places.shape)
