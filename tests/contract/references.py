"""Trusted implementations of the variants that PEFT has, and of the two controls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import AB, ALPHA, DECAY, LEARNING_RATE, RANK, STEPS, Reference, lora_config
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    DeloraConfig,
    EvaConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PsoftConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from variants.adapters import Adapters
from variants.targets import is_conv1d
from variants.testing.rig import Case, model_output

REFERENCES: dict[str, Reference] = {}
"""A trusted implementation of each variant that has one, by the variant's name."""
OTHER_SETTINGS: dict[str, dict[str, Reference]] = {}
"""References for further settings of a variant, by the variant's name and a word for the settings."""


def method(kind: type[PeftConfig], **fields: object) -> Callable[[list[str]], PeftConfig]:
    """Return a function that builds a PEFT config of one class with these fields."""
    return lambda targets: kind(target_modules=targets, **fields)


def modules_of(reference_model: PeftModel) -> dict[str, Any]:
    """Return the modules of the base model by their names."""
    return dict(reference_model.get_base_model().named_modules())


def copy_from_layers(attribute: str) -> Callable[[PeftModel, Adapters, Case], None]:
    """Return a function that copies one tensor of each PEFT layer to the only frozen one of our layer."""

    def init(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
        modules = modules_of(reference_model)
        for key, tensor in adapters.frozen("0").items():
            tensor.copy_(getattr(modules[key.rpartition(".")[0]], attribute)["default"])

    return init


def copy_from_model(prefix: str) -> Callable[[PeftModel, Adapters, Case], None]:
    """Return a function that copies PEFT's matrices A and B of the whole model to the lane."""

    def init(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
        for key, tensor in adapters.frozen("0").items():
            tensor.copy_(getattr(reference_model.base_model, f"{prefix}_{key[-1]}")["default"])

    return init


# PEFT's AdaLoRA with its allocation of ranks after each step.


def _adalora(orthogonality: float, final: int) -> Reference:
    """Return AdaLoRA's reference, whose ranks are fixed for the last `final` steps."""
    return Reference(
        method(
            AdaLoraConfig, init_r=6, target_r=RANK, lora_alpha=int(ALPHA), total_step=STEPS,
            tinit=2, tfinal=final, orth_reg_weight=orthogonality,
        ),
        {f"lora_{name}": name for name in "AEB"},
        extra={"initial": 1.5, "warmup": 0.2, "final": final / STEPS, "orthogonality": orthogonality},
        after_step=lambda model, step: model.base_model.update_and_allocate(step),
    )  # fmt: skip


REFERENCES["adalora"] = _adalora(orthogonality=0.5, final=0)
ADALORA_FIXED_RANKS = _adalora(orthogonality=0.0, final=4)
"""The ranks are fixed in the last steps. There is no orthogonality loss, which then differs from PEFT's."""


# PEFT's BOFT with one factor and with several, for which PEFT itself needs a GPU.


NAMES = {"boft_R": "M", "boft_s": "s"}
REFERENCES["boft"] = Reference(method(BOFTConfig), NAMES, models=("llama",))
OTHER_SETTINGS["boft"] = {
    f"{factors} factors of blocks of {size}": Reference(
        method(BOFTConfig, boft_block_size=size, boft_n_butterfly_factor=factors),
        NAMES,
        extra={"block_size": size, "factors": factors},
    )
    for size, factors in ((4, 2), (2, 3))
}


class _BlockDiagonal:
    """In place of PEFT's CUDA extension: block-diagonal matrices (m, in, in) of blocks (m, in / b, b, b)."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*each) for each in blocks])


def replace_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT compute several factors without its CUDA extension."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", _BlockDiagonal)


# PEFT's CorDA in its instruction mode, initialized from the samples of the lane's calibration batches.


def _init_corda(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Initialize CorDA in PEFT, whose hooks expect batches of one sample."""
    modules = modules_of(reference_model)
    layers = nn.ModuleDict({str(i): modules[name].base_layer for i, name in enumerate(adapters.layers)})
    config = LoraConfig(r=RANK, target_modules=list(layers), corda_config=CordaConfig(corda_method="ipm"))

    def run() -> None:
        with reference_model.disable_adapter():
            for sample in torch.cat([case.rows(0, step) for step in range(3)]).split(1):
                model_output(reference_model, sample)

    preprocess_corda(layers, config, run)
    for name in adapters.layers:
        modules[name].corda_init("default", "corda")
        assert torch.isfinite(modules[name].lora_A["default"].weight).all()


REFERENCES["corda"] = Reference(
    lora_config(),
    AB,
    residual=True,
    residual_tolerance=1e-4,  # PEFT also inverts the moment in float32
    init=_init_corda,
)


# PEFT's DeLoRA, which starts from B = 0 and adapts layers of type Linear only.


def _widen_norms(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Compute the norms of W's columns again in float64, because PEFT made them in float32."""
    modules = modules_of(reference_model)
    for name, layer in adapters.layers.items():
        norms = layer.frozen_layer.weight.norm(dim=0)
        torch.testing.assert_close(modules[name].delora_w_norm["default"].double(), norms, rtol=1e-6, atol=0)
        modules[name].delora_w_norm["default"] = norms


REFERENCES["delora"] = Reference(
    method(DeloraConfig, r=RANK, delora_lambda=8),
    {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda"},
    extra={"initial": "zero"},
    init=_widen_norms,
    models=("llama",),
)


# PEFT's DoRA.


REFERENCES["dora"] = Reference(lora_config(use_dora=True), {**AB, "lora_magnitude_vector": "m"})


# PEFT's DoRA over its PiSSA.


REFERENCES["dude"] = Reference(
    lora_config(init_lora_weights="pissa", use_dora=True), {**AB, "lora_magnitude_vector": "m"}, residual=True
)


# PEFT's EVA, initialized from the lane's calibration batches.


def _init_eva(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Initialize EVA in PEFT with the lane's calibration batches, and compare ranks and directions."""
    with torch.random.fork_rng():
        batches = [{"input_ids": torch.cat([case.rows(0, step) for step in range(3)])}]
        initialize_lora_eva_weights(reference_model, batches, show_progress_bar=False)
    modules = modules_of(reference_model)
    ranks = adapters.ranks_in_use("0")
    assert len(set(ranks.values())) > 1
    assert ranks == {name: modules[name].r["default"] for name in ranks}
    for name, rank in ranks.items():
        mine, a = adapters.trainable("0")[f"{name}.A"][:rank], modules[name].lora_A["default"].weight
        assert nn.functional.cosine_similarity(mine, a.to(mine), dim=1).abs().min() > 1 - 1e-5


REFERENCES["eva"] = Reference(
    lora_config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)), AB, init=_init_eva
)


# PEFT's FourierFT, whose locations are copied to the lane.


FREQUENCIES, SCALE = 20, 20.0


def _copy_locations(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    copy_from_layers("indices")(reference_model, adapters, case)
    assert all(t.all() for t in adapters.frozen("0").values()), "a location in the first row or column"


REFERENCES["fourier_ft"] = Reference(
    # With this seed no location is in the first row or column of a spectrum. These are sums over outputs or
    # inputs, whose gradient is zero beside GPT-2's layer norms: AdamW would make steps of PEFT's rounding.
    method(FourierFTConfig, n_frequency=FREQUENCIES, scaling=SCALE, random_loc_seed=412),
    {"fourierft_spectrum": "entries"},
    extra={"frequencies": FREQUENCIES, "scale": SCALE},
    init=_copy_locations,
    tolerance=1e-4,
)


# AdamW on the model itself.


REFERENCES["full"] = Reference(None)


# PEFT's GraLoRA in its hybrid form.


REFERENCES["gralora"] = Reference(
    method(GraloraConfig, r=RANK, alpha=int(ALPHA), hybrid_r=2, gralora_k=2),
    {f"gralora_{name}_general.weight": f"H{name}" for name in "AB"}
    | {f"gralora_{name}": name for name in "AB"},
    extra={"blocks": 2, "hybrid_rank": 2},
)  # fmt: skip


# AdamW on the head alone.


REFERENCES["head_only"] = Reference(None, models=("headed",))


# PEFT's HiRA.


REFERENCES["hira"] = Reference(method(HiraConfig, r=RANK), {"hira_A": "A", "hira_B": "B"})


# PEFT's HRA.


REFERENCES["hra"] = Reference(method(HRAConfig, r=RANK), {"hra_u": "U"}, models=("llama",))


# PEFT's IA3 without layers whose input is scaled.


REFERENCES["ia3"] = Reference(method(IA3Config, feedforward_modules=[]), {"ia3_l": "l"})


# PEFT's LoHa.


REFERENCES["loha"] = Reference(
    method(LoHaConfig, r=RANK, alpha=int(ALPHA)),
    {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
    models=("llama",),
)


# PEFT's LoKr, at a rank that makes the second factor low-rank in some layers and full in others.


REFERENCES["lokr"] = Reference(
    method(LoKrConfig, r=RANK, alpha=int(ALPHA), decompose_factor=3),
    {"lokr_w1": "C", "lokr_w2_a": "B", "lokr_w2_b": "A", "lokr_w2": "D"},
    extra={"factor": 3},
    models=("llama",),
)


# PEFT's LoRA.


REFERENCES["lora"] = Reference(lora_config(), AB)


# PEFT's LoRA with a frozen A and its optimizer for LoRA-FA.


def _freeze_a(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Freeze A in PEFT, as its optimizer will, and copy the lane's A to it."""
    modules = modules_of(reference_model)
    for name in adapters.layers:
        a = modules[name].lora_A["default"].weight
        a.requires_grad_(False)
        a.copy_(adapters.frozen("0")[f"{name}.A"])


class _WithAdamWsConventions:
    """PEFT's optimizer with AdamW's weight decay and epsilon, which PEFT applies at other places.

    PEFT decays after the step and divides by sqrt(v) + epsilon, where v is not yet corrected for its bias.
    """

    def __init__(self, model: PeftModel) -> None:
        self.optimizer = create_lorafa_optimizer(model, RANK, int(ALPHA), LEARNING_RATE)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.steps = 0

    def zero_grad(self) -> None:
        """Delete the gradients."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        self.steps += 1
        for parameter in self.parameters:
            parameter.mul_(1 - LEARNING_RATE * DECAY)
        self.optimizer.param_groups[0]["eps"] = 1e-8 * math.sqrt(1 - 0.999**self.steps)
        self.optimizer.step()


REFERENCES["lora_fa"] = Reference(
    lora_config(), {"lora_B.weight": "B"}, init=_freeze_a, optimizer=_WithAdamWsConventions
)  # type: ignore[arg-type]


# PEFT's LoRA with its optimizer for LoRA+.


REFERENCES["lora_plus"] = Reference(
    lora_config(),
    AB,
    optimizer=lambda model: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=16, loraplus_weight_decay=DECAY
    ),
)


# PEFT's MiSS.


REFERENCES["miss"] = Reference(method(MissConfig, r=RANK), {"miss_block": "D"}, models=("llama",))


# PEFT's OFT with the Cayley-Neumann series and in the exact form, both with blocks of 8 inputs.


REFERENCES["oft"] = Reference(
    method(OFTConfig, oft_block_size=8), {"oft_R.weight": "Q"}, extra={"block_size": 8}, models=("llama",)
)
OTHER_SETTINGS["oft"] = {
    "exact": Reference(
        method(OFTConfig, oft_block_size=8, use_cayley_neumann=False),
        {"oft_R.weight": "Q"},
        extra={"block_size": 8, "cayley_neumann": False},
    )
}


# PEFT's OLoRA. PEFT cannot initialize Conv1D layers, so their factors are computed here.


def _init_olora(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = modules_of(reference_model)
    for name, layer in adapters.layers.items():
        module = modules[name]
        if not is_conv1d(layer.base_layer):
            module.olora_init("default")
            continue
        # PEFT decomposes the stored weight of such a layer, W^T, whose factors fit square layers only.
        q, r = torch.linalg.qr(module.base_layer.weight.t())
        module.lora_A["default"].weight.copy_(r[:RANK])
        module.lora_B["default"].weight.copy_(q[:, :RANK])
        module.base_layer.weight.sub_(module.scaling["default"] * (q[:, :RANK] @ r[:RANK]).t())


REFERENCES["olora"] = Reference(lora_config(), AB, residual=True, init=_init_olora)


# PEFT's PiSSA.


REFERENCES["pissa"] = Reference(lora_config(init_lora_weights="pissa"), AB, residual=True)


# PEFT's PSOFT, whose singular vectors are copied to the lane, because their signs are not unique.


def _copy_subspace(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = modules_of(reference_model)
    for name in adapters.layers:
        a, b = modules[name]._get_psoft_ab_cache_buffers("default")
        frozen = adapters.frozen("0")
        frozen[f"{name}.Vh"].copy_(a)
        frozen[f"{name}.US"].copy_(modules[name].scaling["default"] * b)


REFERENCES["psoft"] = Reference(
    method(PsoftConfig, r=RANK),
    {"psoft_R.weight": "Q", "psoft_R.vector_a": "a", "psoft_R.vector_b": "b"},
    init=_copy_subspace,
    models=("llama",),
)


# PEFT's RandLoRA on the whole model, whose bases are copied to the lane.


def _copy_bases(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Compare the initial scales, which involve no noise, and copy the bases."""
    modules = modules_of(reference_model)
    for name in adapters.layers:
        for ours, theirs in {"l": "randlora_lambda", "g": "randlora_gamma"}.items():
            own, expected = adapters.trainable("0")[f"{name}.{ours}"], getattr(modules[name], theirs)
            torch.testing.assert_close(own, expected["default"].to(own))
    copy_from_model("randlora")(reference_model, adapters, case)


REFERENCES["rand_lora"] = Reference(
    method(RandLoraConfig, r=2 * RANK, randlora_alpha=int(2 * ALPHA)),
    {"randlora_lambda": "l", "randlora_gamma": "g"},
    extra={"rank_factor": 2, "normalized": False},
    init=_copy_bases,
)


# PEFT's RoAd: the form with the most angles, and the other two forms.


def _reference(form: str, group_size: int) -> Reference:
    return Reference(
        method(RoadConfig, variant=form, group_size=group_size),
        {"road_theta": "theta", "road_alpha": "scale"},
        extra={"form": form, "group_size": group_size},
        models=("llama",),
    )


REFERENCES["road"] = _reference("road_4", 8)
OTHER_SETTINGS["road"] = {form: _reference(form, size) for form, size in (("road_1", 2), ("road_2", 8))}


# PEFT's LoRA with its Riemannian optimizer.


REFERENCES["rplora"] = Reference(
    lora_config(),
    AB,
    optimizer=lambda model: create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=DECAY
    ),
)


# PEFT's rsLoRA.


REFERENCES["rslora"] = Reference(lora_config(use_rslora=True), AB)


# PEFT's SHiRA, whose random indices are copied to the lane.


REFERENCES["shira"] = Reference(
    method(ShiraConfig, r=RANK, random_seed=5),
    {"shira_weight": "values"},
    init=copy_from_layers("shira_indices"),
    models=("llama",),
)


# PEFT's Uni-LoRA, whose places in its vector are copied to the lane.


def _init_uni_lora(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules, frozen = modules_of(reference_model), adapters.frozen("0")
    for name in adapters.layers:
        for factor in "AB":
            places = getattr(modules[name], f"unilora_indices_{factor}")["default"]
            frozen[f"{name}.I{factor}"].copy_(places)
            scales = getattr(modules[name], f"unilora_scales_{factor}")
            counts = scales["default"].double().pow(-2).round()
            assert set(counts.unique().tolist()) == set(frozen[f"{name}.norm"].pow(-2).round().tolist())
            scales["default"] = frozen[f"{name}.norm"][places] = counts.rsqrt()  # PEFT's are float32


REFERENCES["uni_lora"] = Reference(
    method(UniLoraConfig, r=RANK, theta_d_length=300),
    {"unilora_theta_d": "theta"},
    extra={"length": 300},
    init=_init_uni_lora,
)


# PEFT's VB-LoRA on the whole model, with one learning rate for logits and bank.


REFERENCES["vb_lora"] = Reference(
    method(VBLoRAConfig, r=RANK, num_vectors=12, vector_length=8, topk=3),
    {"vblora_logits_A": "PA", "vblora_logits_B": "PB", "vblora_vector_bank": "bank"},
    extra={"vectors": 12, "vector_length": 8, "top_k": 3, "logit_lr_ratio": 1.0},
)


# PEFT's VeRA, whose frozen matrices are copied to the lane.


REFERENCES["vera"] = Reference(
    method(VeraConfig, r=16 * RANK),
    {"vera_lambda_b": "b", "vera_lambda_d": "d"},
    extra={"rank_factor": 16},
    init=copy_from_model("vera"),
)
