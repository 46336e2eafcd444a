"""Prediction of a study's GPU hours from counted kernels, for a GPU on which nothing has been measured.

The time of a training step has two parts: the operations of its matrix products divided by the GPU's speed in
them, and the bytes that all other kernels move divided by the memory's speed. If Python takes longer to
launch the kernels than both together, that time counts instead.
The constants below are fitted to steps of eight models of 0.6 to 8 B parameters on torch's meta device, with
one lane and rows of one length, counted as in `experiments/benchmarks/meta_step.py`. The formula reproduces
these counts within 6 %, and those of steps with rows of mixed lengths and several lanes within 15 %. How fast
a real GPU is has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from orchestrator.finetune.engine import lane_memory
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.launch.decoder_shape import ModelShape, PredictionError, find_shape
from orchestrator.launch.prices import GpuPrice
from orchestrator.study.configuration import BatchConfig, Configuration, ModelChoice

PRODUCT_SHARE, MEMORY_SHARE = 0.627, 0.776
"""Assumed shares of the peak speeds that products and other kernels reach: 620 TFLOP/s and 2.6 TB/s of an
H100."""
LAUNCH_SECONDS = 10e-6
"""Assumed time in which Python launches a kernel."""
DECODE_LAYER_SECONDS = 1e-4
"""Assumed time of a block in a decode step as a CUDA graph, without reading weights and cache: 40 kernels."""
RANGE = (1.1, 1.45)
"""The prediction is a range of these multiples of the calculated time: products of a study's sizes and
attention reach smaller shares of the peak speeds, and the optimizer's time is left out."""
COMPUTED_TOKENS = 1.3
"""Computed tokens per token of a row. In micro-batches that are cut from 64 rows sorted by length 1.2 are
computed; the rest is for kernels that are too short to reach the assumed speeds."""
CHARACTERS_PER_TOKEN = 3.3
"""Assumed mean characters of a token."""
SAMPLED_EXAMPLES = 256
"""Training examples from which the lengths of rows are estimated."""
MAX_DECODE_ROWS = 512
"""Answers that are generated at once, as `MAX_GPU_ROWS` in `finetune/evaluation/generation_plan.py`."""
VALUE_BYTES = 2
"""Bytes of a bfloat16 value."""


@dataclass(frozen=True)
class KernelCost:
    """Bytes that the base model's kernels move, per token of a step and element, and their number."""

    norm: float
    """Bytes per element that passes through RMSNorm."""
    attention: float
    """Bytes per output of the projections of queries and keys."""
    mlp: float
    """Bytes per intermediate value of the MLP."""
    launches: int
    """Kernels per block and pass, without the adapters' and those that normalize queries."""
    query_norm_launches: int
    kept: float
    """Values that are kept for the backward pass, per input and output of a linear layer."""


@dataclass(frozen=True)
class AdapterCost:
    """What the adapters of a variant add, per token of a step."""

    connection: float
    """Bytes per input and output of an adapted layer."""
    output: float
    """Bytes per output of an adapted layer."""
    products: float
    """Operations of a block's products, in multiples of those of the frozen base model."""
    launches: int
    """Kernels per block and pass, more or fewer than those of the base model."""
    lane_launches: int
    """Kernels per block and micro-batch of a lane."""
    kept: float = 0.0
    """Values that are kept for the backward pass, per input and output of a linear layer."""


KERNELS = {"torch": KernelCost(118, 68, 29, 184, 44, 1.45), "liger": KernelCost(8.7, 21, 18, 117, 4, 1.1)}
"""Value of --kernels -> cost."""
_LORA = AdapterCost(9.5, 0, 1, -14, 0)
ADAPTERS = {
    "lora": _LORA,
    "rslora": _LORA,
    "lora_plus": _LORA,
    "pissa": AdapterCost(9.5, 0, 1, 21, 0),
    "dora": AdapterCost(11, 22, 1, 119, 0, 0.55),
    "hira": AdapterCost(2.1, 0, 2.88, -28, 70),
}
"""Variant -> cost. The other variants have not been counted."""
HEAD_LAUNCHES = 75
"""Kernels of the output layer and the loss, per micro-batch of a lane."""
VOCAB_BYTES = 52
"""Bytes per labelled token and entry of the vocabulary that the output layer and the loss move."""


@dataclass(frozen=True)
class RowLengths:
    """Mean lengths of a task's rows in tokens."""

    prompt: float
    answer: float

    @property
    def row(self) -> float:
        """Tokens of a whole row."""
        return self.prompt + self.answer

    @classmethod
    def sample(cls, task: Task, max_length: int) -> RowLengths:
        """Estimate the lengths from the characters of the first training examples.

        Args:
            task: A task without images.
            max_length: The longest row in tokens.
        """
        examples = task.examples("train", SAMPLED_EXAMPLES)
        prompt = mean(len(each.prompt) for each in examples) / CHARACTERS_PER_TOKEN
        answer = mean(len(each.answer) for each in examples) / CHARACTERS_PER_TOKEN
        prompt = min(prompt, max_length / 2)
        return cls(prompt, max(1.0, min(answer, max_length - prompt)))


@dataclass(frozen=True)
class Prediction:
    """The predicted time of configurations on one GPU, without the start of trainers."""

    seconds: float
    row_tokens: float
    """Assumed mean tokens of a row; the largest of all tasks."""
    num_included: int
    """The number of configurations whose time is included."""
    excluded: tuple[str, ...]
    """Variants that are not included, because nothing about them has been counted."""

    @property
    def range_seconds(self) -> tuple[float, float]:
        """The lower and the upper end."""
        low, high = RANGE
        return low * self.seconds, high * self.seconds


class _Inputs:
    """The shapes of models and the lengths of rows that predictions need, each read once.

    Args:
        bases: The store's folder of base models.
    """

    def __init__(self, bases: Path) -> None:
        self._bases = bases
        self._shapes: dict[ModelChoice, ModelShape] = {}
        self._rows: dict[tuple[str, int], RowLengths] = {}

    def find(self, configuration: Configuration) -> tuple[Task, ModelShape, RowLengths]:
        """Return the task, the shape of the model and the lengths of the rows.

        Raises:
            PredictionError: Nothing about such steps has been counted.
        """
        task, model = tasks.get(configuration.task.name), configuration.model
        if task.has_head:
            raise PredictionError(f"steps of tasks like {configuration.task.name} have not been counted")
        if model not in self._shapes:
            self._shapes[model] = find_shape(model, self._bases)
        key = configuration.task.name, configuration.batches.max_length
        if key not in self._rows:
            self._rows[key] = RowLengths.sample(task, configuration.batches.max_length)
        return task, self._shapes[model], self._rows[key]


def predict(
    pending: Sequence[Configuration],
    bases: Path,
    gpu: GpuPrice,
    lanes: int,
    kernels: str = "torch",
    checkpointing: bool = False,
) -> Prediction:
    """Predict the time of configurations on a GPU.

    Args:
        pending: The configurations to train.
        bases: The store's folder of base models.
        gpu: The GPU.
        lanes: Lanes per trainer.
        kernels: The value of --kernels.
        checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        PredictionError: Nothing about these steps or this GPU is known.
    """
    if gpu.bf16_tflops is None:
        raise PredictionError(f"a {gpu.gpu} has no bfloat16")
    total, longest, num_included = 0.0, 0.0, 0
    excluded: dict[str, None] = {}
    inputs = _Inputs(bases)
    for each in pending:
        task, shape, rows = inputs.find(each)
        if each.variant.name not in ADAPTERS:
            excluded[each.variant.name] = None
            continue
        longest, num_included = max(longest, rows.row), num_included + 1
        step = step_seconds(shape, each.variant.name, each.batches, rows, gpu, lanes, kernels)
        total += _evaluation_seconds(each, task, shape, rows, gpu, step)
        # The forward pass, a third of a step, is computed twice.
        total += step * each.lr_schedule.steps * (4 / 3 if checkpointing else 1)
    if not num_included:
        raise PredictionError(f"steps of {', '.join(excluded)} have not been counted")
    return Prediction(total, longest, num_included, tuple(excluded))


def predict_lanes(
    configurations: Sequence[Configuration],
    bases: Path,
    memory: float,
    kernels: str = "torch",
    checkpointing: bool = False,
) -> tuple[int, int]:
    """Predict how many lanes trainers on GPUs will choose; see `finetune/engine/lane_memory.py`.

    Args:
        configurations: One configuration of each group key.
        bases: The store's folder of base models.
        memory: The memory in bytes that a trainer may use.
        kernels: The value of --kernels.
        checkpointing: Whether activations are computed again in the backward pass.

    Returns:
        The smallest number of lanes of all configurations, and the mean tokens of a micro-batch of its lanes.

    Raises:
        PredictionError: The memory of none of these variants has been counted, or the steps of one of these
            tasks or models have not.
    """
    inputs = _Inputs(bases)
    counted = [each for each in configurations if each.variant.name in ADAPTERS]
    if not counted:
        raise PredictionError("the memory of no such step has been counted")
    found = []
    for each in counted:
        _, shape, rows = inputs.find(each)
        tokens = round(rows.row * each.batches.micro_batch_size)
        # The second time for an output layer of its own, or for the logits of a chunk.
        weights = shape.layers * shape.layer_weights + 2 * shape.hidden * shape.vocab
        left = lane_memory.MEMORY_SHARE * memory - VALUE_BYTES * weights
        fitting = int(left // lane_bytes(shape, each.variant.name, tokens, kernels, checkpointing))
        found.append((lane_memory.limit_lanes(fitting, tokens), tokens))
    return min(found)


def lane_bytes(shape: ModelShape, variant: str, tokens: float, kernels: str, checkpointing: bool) -> float:
    """Return the bytes that a lane keeps for the backward pass of a micro-batch.

    Args:
        shape: The shape of the model.
        variant: The variant.
        tokens: Mean tokens of a micro-batch.
        kernels: The value of --kernels.
        checkpointing: Whether only the inputs of blocks are kept, and the values of one block.
    """
    kept = KERNELS[kernels].kept + ADAPTERS[variant].kept
    block = kept * (shape.layer_inputs + shape.layer_outputs)
    values = block + shape.layers * shape.hidden if checkpointing else shape.layers * block
    return VALUE_BYTES * values * COMPUTED_TOKENS * tokens


def step_seconds(
    shape: ModelShape,
    variant: str,
    batches: BatchConfig,
    rows: RowLengths,
    gpu: GpuPrice,
    lanes: int,
    kernels: str,
) -> float:
    """Return the predicted seconds of a lane's optimizer step, its share of a group of `lanes` lanes."""
    step_rows = batches.micro_batch_size * batches.accumulation_steps
    tokens, labelled = COMPUTED_TOKENS * rows.row * step_rows, rows.answer * step_rows
    device = tokens * shape.layers * _layer_seconds(shape, variant, rows, gpu, kernels)
    head_operations = 4 * shape.hidden * shape.vocab
    device += labelled * (head_operations / _products(gpu) + VOCAB_BYTES * shape.vocab / _memory(gpu))
    launches = _count_launches(shape, variant, kernels, batches.accumulation_steps, lanes)
    return max(device, launches * LAUNCH_SECONDS / lanes)


def _layer_seconds(shape: ModelShape, variant: str, rows: RowLengths, gpu: GpuPrice, kernels: str) -> float:
    """Return the seconds of the device for a block and a token, forward and backward."""
    base, adapter = KERNELS[kernels], ADAPTERS[variant]
    rotated = shape.queries + shape.keys
    normed = 2 * shape.hidden + (rotated if shape.norms_queries else 0)
    moved = base.norm * normed + base.attention * rotated + base.mlp * shape.intermediate
    moved += adapter.connection * (shape.layer_inputs + shape.layer_outputs)
    moved += adapter.output * shape.layer_outputs
    # A frozen weight has two products of 2 operations: the output, and the gradient of the input. Causal
    # attention has two products forward and five backward, each over half of the row on average.
    operations = 4 * adapter.products * shape.layer_weights + 7 * shape.queries * rows.row
    return operations / _products(gpu) + moved / _memory(gpu)


def _count_launches(shape: ModelShape, variant: str, kernels: str, micro_batches: int, lanes: int) -> float:
    """Return the kernels of a step of all lanes, forward and backward.

    Args:
        shape: The shape of the model.
        variant: The variant.
        kernels: The value of --kernels.
        micro_batches: Micro-batches of a lane.
        lanes: The number of lanes.
    """
    base, adapter = KERNELS[kernels], ADAPTERS[variant]
    normed = base.query_norm_launches if shape.norms_queries else 0
    # Micro-batches of several lanes share a pass only if they have one length.
    passes = micro_batches * (1 if lanes == 1 else 1.3)
    shared = passes * shape.layers * (base.launches + normed + adapter.launches)
    return shared + micro_batches * lanes * (shape.layers * adapter.lane_launches + HEAD_LAUNCHES)


def _evaluation_seconds(
    configuration: Configuration, task: Task, shape: ModelShape, rows: RowLengths, gpu: GpuPrice, step: float
) -> float:
    """Return the seconds of all evaluations of a lane: the losses, and the generated answers.

    Args:
        configuration: The lane's configuration.
        task: Its task.
        shape: The shape of the model.
        rows: Mean lengths of the rows.
        gpu: The GPU.
        step: Seconds of an optimizer step, a third of which are its forward pass.
    """
    choice, batches = configuration.task, configuration.batches
    evaluations = configuration.evaluations
    test_evaluations = evaluations if configuration.test_evaluations == "every" else 1
    scored = evaluations * choice.validation_size + test_evaluations * choice.test_size
    seconds = step / 3 * scored / (batches.micro_batch_size * batches.accumulation_steps)
    if task.output != "generation":
        return seconds
    answered = {"validation": choice.validation_size, "test": choice.test_size}
    graded = evaluations if task.grade_at == "every_evaluation" else 1
    steps = sum(
        times * -(-answered[split] * task.samples // MAX_DECODE_ROWS) * task.max_new_tokens
        for split, times in (("validation", graded), ("test", test_evaluations))
    )
    answers = task.samples * (graded * choice.validation_size + test_evaluations * choice.test_size)
    weights = VALUE_BYTES * (shape.layers * shape.layer_weights + shape.hidden * shape.vocab)
    cached = VALUE_BYTES * 2 * shape.layers * shape.keys
    read = steps * weights + answers * rows.answer * (rows.prompt + rows.answer) * cached
    return seconds + steps * shape.layers * DECODE_LAYER_SECONDS + read / _memory(gpu)


def _products(gpu: GpuPrice) -> float:
    """Return the assumed operations per second of products."""
    return PRODUCT_SHARE * 1e12 * (gpu.bf16_tflops or 0.0)


def _memory(gpu: GpuPrice) -> float:
    """Return the assumed bytes per second of the memory."""
    return MEMORY_SHARE * 1e12 * gpu.tb_per_s
