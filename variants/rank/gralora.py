"""GraLoRA: a LoRA for each block of a grid over the weight."""

from torch import Tensor

from variants import api


class GraLoRA(api.PeftFormat, api.Variant):
    """W' = W + s [B_jn A_jn], a grid of k x k blocks (j of the outputs, n of the inputs), s = alpha / rank.

    Each block has a LoRA of rank / k, so that the update has a rank of up to k * rank with LoRA's number of
    parameters. "A" is (k, in / k, rank): entry [n, :, j * rank/k + i] is row i of A_jn. "B" is
    (k, rank, out / k): entry [j, n * rank/k + i] is column i of B_jn.

    With `hybrid_rank` h > 0, a LoRA of the whole layer, HB HA with HA (h, in) and HB (out, h), is added to
    the grid, and s = alpha / (rank + h).

    Initialization: A from U(-sqrt(k / in), sqrt(k / in)), HA from U(-1/sqrt(in), 1/sqrt(in)), B = HB = 0, so
    W' = W.

    The rule and the defaults (k = 2, no hybrid) are those of PEFT, whose authors are the paper's. The paper
    uses k = 4 from rank 64, and of a total rank of 16 it gives 8 to the hybrid.
    """

    paper = "Jung et al., arXiv 2505.20355"
    year = 2025
    verified_by = api.VerifiedBy.REFERENCE_IMPLEMENTATION
    hyperparameters = {
        "blocks": api.Int(2, divides=("in", "out"), help="number k of blocks along each side of the weight"),
        "hybrid_rank": api.Int(0, minimum=0, help="rank of an additional LoRA of the whole layer"),
    }
    peft = api.PeftMethod(
        "GRALORA",
        {
            "A": "gralora_A",
            "B": "gralora_B",
            "HA": "gralora_A_general.weight",
            "HB": "gralora_B_general.weight",
        },
        alpha="alpha",
        dropout="gralora_dropout",
        fields={"blocks": "gralora_k", "hybrid_rank": "hybrid_r"},
        optional=frozenset({"HA", "HB"}),
    )

    def scaling(self, settings: api.VariantSettings) -> float:
        assert settings.alpha is not None
        return settings.alpha / (settings.rank + settings["hybrid_rank"])

    def check_settings(self, settings: api.VariantSettings) -> None:
        if settings.rank % settings["blocks"]:
            raise api.UnsupportedError(
                f"rank {settings.rank}: must be a multiple of blocks {settings['blocks']}"
            )

    def init(self, layer: api.FrozenLayer, random: api.LayerRandom) -> api.InitialTensors:
        (out_features, in_features), rank = layer.shape, layer.settings.rank
        blocks, hybrid_rank = layer.settings["blocks"], layer.settings["hybrid_rank"]
        piece = in_features // blocks
        a = random.kaiming("A", (blocks, piece, rank), fan_in=piece)
        trainable = {"A": a, "B": a.new_zeros(blocks, rank, out_features // blocks)}
        if hybrid_rank:
            trainable["HA"] = random.kaiming("HA", (hybrid_rank, in_features))
            trainable["HB"] = a.new_zeros(out_features, hybrid_rank)
        return api.InitialTensors(trainable)

    def prepare(self, params: api.Params, layer: api.FrozenLayer) -> api.Params:
        scaled = {"B": layer.scaling.unsqueeze(3) * params["B"]}
        if "HB" in params:
            scaled["HB"] = layer.scaling * params["HB"]
        return {**params, **scaled}

    def forward(self, x: Tensor, base: Tensor, params: api.Params, layer: api.FrozenLayer) -> Tensor:
        a, b = (params[name].to(x.dtype).flatten(0, 1) for name in "AB")  # (K * k, ...)
        grid = (*x.shape[:2], layer.settings["blocks"])
        pieces = x.unflatten(2, (grid[2], -1)).transpose(1, 2).flatten(0, 1)  # (K * k, N, in / k)
        hidden = api.bmm(pieces, a).view(grid[0], grid[2], grid[1], grid[2], -1)  # (K, n, N, j, rank / k)
        hidden = hidden.permute(0, 3, 2, 1, 4).reshape(len(a), grid[1], -1)  # (K * j, N, n * rank / k)
        update = api.bmm(hidden, b).view(grid[0], grid[2], grid[1], -1).transpose(1, 2).reshape(base.shape)
        if "HA" in params:
            ha, hb = (params[name].to(x.dtype).transpose(1, 2) for name in ("HA", "HB"))
            base = api.baddbmm(base, api.bmm(x, ha), hb)
        return base + update
