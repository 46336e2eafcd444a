"""Compare one optimizer step of each variant with PEFT's and with the frozen base model.

    python experiments/benchmarks/step.py                          letters, then two sizes of SmolLM2-135M
    python experiments/benchmarks/step.py --cases 135m-128 --layers 8 --variants lora dora
    python experiments/benchmarks/step.py --cases qwen             on a GPU: Qwen3-0.6B, bfloat16, 8 x 384

A step is forward, backward and AdamW. Three sides run in turn: this project with one lane, PEFT, and the
frozen base model (forward and backward to its input embeddings, no optimizer). All have the same random base,
the same tokens, the same data type and loss. The table has the median over the rounds of the ratio of times
(quartiles in brackets), and the memory of this project and of PEFT in MiB: what is kept for the backward
pass, and the peak of all tensors that a step allocates. On a GPU the peak is that of the allocator.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from measuring import (
    Summary,
    choose_device,
    make_parser,
    markdown_table,
    ratios,
    synchronize,
    time_in_turn,
    write_results,
)
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    EvaConfig,
    HiraConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_loraplus_optimizer
from synthetic_task import build_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.util.command import main
from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import CalibrationStatistic, VariantSettings, statistic_of
from variants.calibrate import calibrate
from variants.testing.rig import LaneOptimizer

RANK, ALPHA, LEARNING_RATE, TOTAL_STEPS = 8, 16, 1e-4, 1000
VERA_FACTOR = 16
RAND_LORA_FACTOR = 4
LORA_PLUS_RATIO = 16


@dataclass(frozen=True)
class Case:
    """A base model and the size of a batch."""

    shape: str
    rows: int
    length: int
    layers: int | None = None
    dtype: torch.dtype = torch.float32


CASES = {
    "tiny": Case("tiny", 2, 16),
    "letters": Case("letters", 16, 12),
    "135m-128": Case("smollm2-135m", 1, 128),
    "135m-1024": Case("smollm2-135m", 1, 1024, layers=6),
    "qwen": Case("qwen3-0.6b", 8, 384, dtype=torch.bfloat16),
    "qwen-1024": Case("qwen3-0.6b", 2, 1024, dtype=torch.bfloat16),
}


def _lora(**more: Any) -> Callable[[list[str]], PeftConfig]:
    return lambda targets: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **more)


PEFT_CONFIGS: Mapping[str, Callable[[list[str]], PeftConfig]] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "lora_plus": _lora(),
    "dora": _lora(use_dora=True),
    "pissa": _lora(init_lora_weights="pissa_niter_16"),
    "eva": _lora(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)),
    "hira": lambda targets: HiraConfig(r=RANK, target_modules=targets),
    # Without a task type PEFT calls the model without AdaLoRA's loss term.
    "adalora": lambda targets: AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=RANK * 3 // 2,
        target_r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        total_step=TOTAL_STEPS,
        tinit=TOTAL_STEPS // 10,
        tfinal=TOTAL_STEPS // 2,
    ),
    "vera": lambda targets: VeraConfig(r=VERA_FACTOR * RANK, target_modules=targets),
    "delora": lambda targets: DeloraConfig(r=RANK, delora_lambda=8, target_modules=targets),
    "rand_lora": lambda targets: RandLoraConfig(
        r=RAND_LORA_FACTOR * RANK, randlora_alpha=RAND_LORA_FACTOR * ALPHA, target_modules=targets
    ),
}
"""Variant -> PEFT's configuration for a list of target layers: VeRA and the survey's that PEFT has."""
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "pissa": {"svd": "16"},
    "adalora": {"initial": 1.5, "warmup": 0.1, "final": 0.5},
    "vera": {"rank_factor": VERA_FACTOR},
    "delora": {"initial": "zero"},
    "rand_lora": {"rank_factor": RAND_LORA_FACTOR, "normalized": False, "base_limit": 1 << 20},
    "lora_plus": {"ratio": LORA_PLUS_RATIO},
}
"""Variant -> extra settings with which ours equals PEFT's configuration."""


def compute_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of predicting each token itself; the task does not matter here."""
    return cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


class OurStep:
    """One optimizer step of one lane.

    Args:
        name: The variant.
        model: The base model, which gets the adapters.
        ids: The token ids of the batch, (rows, length).
    """

    def __init__(self, name: str, model: Any, ids: Tensor) -> None:
        variant = catalogue.get(name)
        settings = VariantSettings(RANK, ALPHA if variant.uses_alpha else None, extra=EXTRA.get(name, {}))
        settings = variant.validate_settings(settings)
        self.model, self.ids = model, ids
        self.adapters = attach(model, variant, settings)
        self.adapters.add_lane("lane", settings, 0, _calibrate(self.adapters, settings, ids))
        self.optimizer = LaneOptimizer(self.adapters, "lane", LEARNING_RATE, TOTAL_STEPS)
        self.steps = 0

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        with self.adapters.activate_lanes(["lane"], self.steps, rows_per_lane=len(self.ids)) as context:
            loss = compute_loss(self.model(input_ids=self.ids, use_cache=False).logits, self.ids)
            if (auxiliary := context.auxiliary_loss()) is not None:
                loss = loss + auxiliary.sum()
            self.loss = loss.detach()
            loss.backward()
        self.optimizer.step()
        self.steps += 1


class PeftStep:
    """One optimizer step of PEFT's model.

    Args:
        name: The variant.
        model: The base model, which PEFT changes.
        ids: The token ids of the batch, (rows, length).
        targets: The names of the layers to adapt.
    """

    def __init__(self, name: str, model: Any, ids: Tensor, targets: list[str]) -> None:
        # PEFT's AdaLoRA adds its loss term only to a loss that the model itself has computed.
        model.loss_function = lambda logits, labels, **_: compute_loss(logits, labels)
        torch.manual_seed(0)
        self.model, self.ids, self.name = get_peft_model(model, PEFT_CONFIGS[name](targets)), ids, name
        if name == "eva":
            initialize_lora_eva_weights(self.model, [{"input_ids": ids}] * 3, show_progress_bar=False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        options = {"lr": LEARNING_RATE, "fused": True}
        if name == "lora_plus":
            self.optimizer = create_loraplus_optimizer(
                self.model, torch.optim.AdamW, loraplus_lr_ratio=LORA_PLUS_RATIO, **options
            )
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, **options)
        self.steps = 0

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        self.loss = loss.detach()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        if self.name == "adalora":
            self.model.base_model.update_and_allocate(self.steps)


class BaseStep:
    """Forward and backward pass of the frozen base model, to its input embeddings."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def __call__(self) -> None:
        """Compute the gradient of the embedded tokens."""
        embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits
        compute_loss(logits, self.ids).backward()


def _calibrate(adapters: Adapters, settings: VariantSettings, ids: Tensor) -> Any:
    if statistic_of(adapters.variant) is CalibrationStatistic.NONE:
        return None

    def iterate_losses() -> Iterator[Tensor]:
        for _ in range(3):
            with adapters.disable_adapters():
                yield compute_loss(adapters.model(input_ids=ids, use_cache=False).logits, ids)

    return calibrate(adapters, settings, iterate_losses)


def measure_memory(step: OurStep | PeftStep, device: torch.device) -> tuple[float, float]:
    """Return what a step keeps for its backward pass, and its peak, in MiB.

    Tensors that exist before the step, such as weights and the optimizer's state, are not counted.

    Args:
        step: The step to measure. It is taken twice.
        device: The device that it runs on.
    """
    step.optimizer.zero_grad()
    resident = {tensor.untyped_storage()._cdata for tensor in _existing_tensors()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        step.optimizer.zero_grad()
        live = LiveTensors(_existing_tensors())
        before = live.now
        with live:
            step()
        peak = live.peak - before
    return sum(kept.values()) / 2**20, peak / 2**20


class LiveTensors(TorchDispatchMode):
    """A context that counts the bytes of all live CPU tensors: `now`, and the largest number so far, `peak`.

    Memory that an operator allocates inside its kernel is not counted.

    Args:
        resident: Tensors that exist before the context, such as weights. They are counted.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        for tensor in resident:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and add its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type == "cpu" and key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _existing_tensors() -> list[Tensor]:
    gc.collect()
    # `isinstance` would import what lazy modules stand for.
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def measure(name: str, case_name: str, case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the measurements of a variant in a case as a row of the result.

    Args:
        name: The name of the variant.
        case_name: The name of the case, for the row.
        case: The base model and the size of a batch.
        device: The device.
        rounds: Number of timed rounds.
    """
    models = [build_model(case.shape, device, case.dtype, case.layers) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, models[0].config.vocab_size, (case.rows, case.length), generator=generator)
    ids = ids.to(device)
    ours = OurStep(name, models[0], ids)
    peft = PeftStep(name, models[1], ids, sorted(ours.adapters.layers))
    seconds = time_in_turn({"ours": ours, "peft": peft, "base": BaseStep(models[2], ids)}, rounds, device)
    kept, peak = measure_memory(ours, device)
    peft_kept, peft_peak = measure_memory(peft, device)
    return {
        "case": case_name,
        "variant": name,
        "layers": models[0].config.num_hidden_layers,
        "losses": [float(ours.loss), float(peft.loss)],
        "milliseconds": {side: 1e3 * Summary.of(values).median for side, values in seconds.items()},
        "ours / PEFT": ratios(seconds["ours"], seconds["peft"]),
        "ours / base": ratios(seconds["ours"], seconds["base"]),
        "kept_mib": [kept, peft_kept],
        "peak_mib": [peak, peft_peak],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the measurements."""
    header = ["case", "variant", "ours, ms", "ours / PEFT", "ours / base", "kept, MiB", "peak, MiB"]
    return markdown_table(
        header,
        [
            [
                row["case"],
                row["variant"],
                f"{row['milliseconds']['ours']:.1f}",
                row["ours / PEFT"],
                row["ours / base"],
                " / ".join(f"{mib:.1f}" for mib in row["kept_mib"]),
                " / ".join(f"{mib:.1f}" for mib in row["peak_mib"]),
            ]
            for row in rows
        ],
    )


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help="default: three, or qwen on a GPU")
    parser.add_argument("--variants", nargs="+", choices=sorted(PEFT_CONFIGS), default=list(PEFT_CONFIGS))
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the three sides; default: 20")
    parser.add_argument("--layers", type=int, help="decoder blocks, in place of those of the case")
    return parser.parse_args()


def run() -> None:
    """Measure every variant in every case, and print the table."""
    options = read_options()
    device = choose_device(options)
    names = options.cases or (["qwen"] if device.type == "cuda" else ["letters", "135m-128", "135m-1024"])
    rows = []
    for case_name in names:
        case = CASES[case_name]
        if options.layers is not None:
            case = Case(case.shape, case.rows, case.length, options.layers, case.dtype)
        for variant in options.variants:
            rows.append(measure(variant, case_name, case, device, options.rounds))
            gc.collect()
            print(format_table(rows[-1:]).splitlines()[-1], flush=True)
            write_results(options.out, device, rows)
    print(format_table(rows))


if __name__ == "__main__":
    main(run)
