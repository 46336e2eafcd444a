"""Tasks made of a user's data: their content, splits, metrics, and the way through the training loop."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_folder
import pytest
from data_rows import CHATS, MAILS, PAIRS, SUMS, task_of, write
from image_data import picture
from resolved import resolve_one_task
from scripted import Script, get_record, leases, train

from orchestrator.finetune.evaluation import metrics
from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve.data import prepare_datasets, write_own_files
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.finetune.tasks.examples import IGNORE_INDEX
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the tasks that a test registers."""
    monkeypatch.setattr(tasks, "_own_tasks", {})


# -- content ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MAILS, SUMS, CHATS, PAIRS], ids=["mails", "sums", "chats", "pairs"])
def test_equal_rows_are_one_task_whatever_their_format_name_order_and_columns(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    first = task_of(write(tmp_path / "mail.jsonl", rows))
    for name in ("mail.json", "mail.csv", "mail.tsv", "mail.parquet", "elsewhere/copy.jsonl"):
        assert task_of(write(tmp_path / name, rows)).content == first.content, name
    renamed = [{f"{name}_": cell for name, cell in row.items()} for row in reversed(rows)]
    columns = tuple(f"{role}={column}_" for role, column in first.spec.columns.items())
    other = task_of(write(tmp_path / "renamed.jsonl", renamed), columns=columns)
    assert other.content == first.content
    assert other.name == "renamed.jsonl"
    fewer = task_of(write(tmp_path / "fewer.jsonl", rows[1:]))
    assert fewer.content != first.content


def test_what_is_done_with_the_rows_is_part_of_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", SUMS)
    options: list[dict[str, Any]] = [
        {},
        {"metric": "loss"},
        {"metric": "numeric"},
        {"template": "So {prompt}"},
    ]
    options.append({"metric": "numeric", "max_new_tokens": 5})
    assert len({task_of(path, **each).content for each in options}) == len(options)


def test_a_dataset_of_the_hub_equals_its_rows_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**row, "split": ("train", "validation", "test")[i % 5 // 2]} for i, row in enumerate(MAILS)]
    splits = {s: [r for r in rows if r["split"] == s] for s in SPLITS}
    hub_folder.write(tmp_path / "data", "org/mail", splits, "small")
    task = task_of("org/mail:small")
    assert (task.name, task.source) == ("mail-small", "org/mail:small")
    assert task.content == task_of(write(tmp_path / "mail.csv", rows)).content


def test_splits_of_the_hub_with_other_names_or_hidden_labels_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    types = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    folder = tmp_path / "data" / "org" / "mail" / "data"
    folder.mkdir(parents=True)
    for split, rows in {"train": MAILS, "unsupervised": MAILS, "test": MAILS}.items():
        labeled = [{**row, "label": -1} if split == "test" else dict(row) for row in rows]
        Dataset.from_list(labeled, features=types).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    task = task_of("org/mail")
    assert task.describe().endswith("; not read: test (its labels are hidden), unsupervised")
    assert task.content == task_of(write(tmp_path / "mail.csv", MAILS)).content


# -- splits -------------------------------------------------------------------------------------------------


def inputs(task: DataTask) -> dict[str, set[str]]:
    assert task.splits is not None
    return {split: {example.prompt for example in own} for split, own in task.splits.items()}


def test_splits_by_hash_are_disjoint_and_keep_their_rows_when_the_data_grow(tmp_path: Path) -> None:
    repeated = [*SUMS, *({"prompt": row["prompt"], "completion": "?"} for row in SUMS)]
    few, many = (inputs(task_of(write(tmp_path / f"{n}.csv", repeated[:n]))) for n in (40, 120))
    for own in (few, many):
        assert not own["train"] & (own["validation"] | own["test"])
        assert not own["validation"] & own["test"]
    assert all(few[split] <= many[split] for split in SPLITS)
    assert len(many["train"]) > len(many["test"]) > 0


def test_splits_may_be_given_by_a_column_files_or_a_folder(tmp_path: Path) -> None:
    by_split = {"train": SUMS[:30], "dev": SUMS[30:40], "test": SUMS[40:]}
    files = {name: write(tmp_path / "f" / f"{name}.jsonl", rows) for name, rows in by_split.items()}
    in_column = [{**row, "split": name} for name, rows in by_split.items() for row in rows]
    given = [
        task_of(tmp_path / "f"),
        task_of(write(tmp_path / "all.csv", in_column)),
        task_of(files["train"], validation_data=str(files["dev"]), test_data=str(files["test"])),
        task_of(files["train"], **dict.fromkeys(("validation_data", "test_data"), str(tmp_path / "all.csv"))),
    ]
    assert len({task.content for task in given}) == 1
    assert {s: len(own) for s, own in inputs(given[0]).items()} == {"train": 30, "validation": 10, "test": 20}
    with pytest.raises(UsageError, match=r"--columns split=prompt: f has splits already; leave"):
        task_of(tmp_path / "f", columns=("split=prompt",))


def test_a_split_is_a_file_that_is_called_exactly_so(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for name in ("train.csv", "test_results.csv", "eval-scores.jsonl", "val.old.csv", "Dev.csv"):
        write(folder / name, SUMS[:30] if name == "train.csv" else SUMS[30:])
    task = task_of(folder)
    said = " training (train.csv), 30 validation (Dev.csv) and 6 test rows (by hash); exact_match; not read: "
    assert said + "eval-scores.jsonl, test_results.csv, val.old.csv" in task.describe()
    write(folder / "test-00000-of-00001-9f8e7d6c5b4a3f21.parquet", SUMS[50:])
    assert len(inputs(task_of(folder))["test"]) == 10
    (folder / "train.csv").rename(folder / "train_data.csv")
    named = r"f: has Dev\.csv, .* but no train file; call the files train\.csv, validation\.csv and test\.csv"
    with pytest.raises(UsageError, match=named):
        task_of(folder)
    assert len(inputs(task_of(write(tmp_path / "more.csv", SUMS), test_data=str(folder)))["test"]) == 10


def test_given_splits_that_overlap_are_counted(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.csv", SUMS[:40]), write(tmp_path / "test.csv", SUMS[35:])
    task = task_of(train, test_data=str(test))
    assert task.describe().startswith("prompt=prompt completion=completion; ")
    assert " training (train.csv), " in task.describe()
    assert task.describe().endswith(" validation (by hash) and 25 test rows (test.csv); exact_match")
    in_train = sum(key in inputs(task)["train"] for key in inputs(task)["test"])
    in_validation = sum(key in inputs(task)["validation"] for key in inputs(task)["test"])
    assert in_train + in_validation == 5
    counts = {"training": in_train, "validation": in_validation}
    expected = [f"{n} of 25 test rows have the input of a {s} row" for s, n in counts.items() if n]
    assert [line.partition(";")[0] for line in task.warnings] == expected
    assert not task_of(train).warnings


def test_one_file_is_not_two_splits(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.csv", SUMS[:40]), write(tmp_path / "test.csv", SUMS[40:])
    with pytest.raises(
        UsageError, match=r"--test-data \S*train\.csv: has the rows of --data \S*train\.csv; give"
    ):
        task_of(train, test_data=str(train))
    with pytest.raises(UsageError, match=r"--test-data \S*test\.csv: has the rows of --validation-data \S*t"):
        task_of(train, test_data=str(test), validation_data=str(test))
    copy = write(tmp_path / "copy.csv", SUMS[10:30])
    with pytest.raises(UsageError, match=r"all 20 test rows are training rows, .* give other test rows"):
        task_of(write(tmp_path / "f" / "train.csv", SUMS), test_data=str(copy), validation_data=str(test))


# -- metrics and defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "metric", "output", "name"),
    [
        (SUMS, None, "teacher_forced", "exact_match"),
        (
            [{**row, "completion": f"{row['completion']} {'x' * 99}"} for row in SUMS],
            None,
            "teacher_forced",
            "inverse_perplexity",
        ),
        (SUMS, "numeric", "generation", "numeric"),
        (SUMS, "token_f1", "generation", "token_f1"),
        (SUMS, "loss", "teacher_forced", "inverse_perplexity"),
        (MAILS, None, "classification", "accuracy"),
        (MAILS, "loss", "classification", "inverse_perplexity"),
        (PAIRS, "f1", "classification", "f1"),
        (
            [{**row, "label": f"{i % 3 // 2}.0"} for i, row in enumerate(MAILS)],
            None,
            "classification",
            "accuracy",
        ),
        ([{**row, "label": i / 4} for i, row in enumerate(MAILS)], "pearson", "regression", "pearson"),
    ],
)
def test_the_metric_decides_what_the_model_produces(
    tmp_path: Path, rows: Any, metric: str | None, output: str, name: str
) -> None:
    task = task_of(write(tmp_path / "rows.csv", rows), metric=metric)
    assert (task.output, task.metric) == (output, name)
    assert (task.max_new_tokens > 0) == (output == "generation")
    assert task.floor == (pytest.approx(2 / 3, abs=0.2) if name == "accuracy" else 0.0)
    if task.has_head:
        metrics.check_metric(task)
        example = task.examples("train", 1)[0]
        assert task.target(example) == (
            float(example.answer) if output == "regression" else task.labels.index(example.answer)
        )
    if name in ("numeric", "token_f1"):
        example = task.examples("test", 1)[0]
        assert task.grade(example, f"The answer is {example.answer.strip()}.") == (
            1.0 if name == "numeric" else 0.5
        )


def test_a_template_and_alpacas_input_make_the_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i}", "input": "to 1" * (i % 2), "output": str(i)} for i in range(40)]
    path = write(tmp_path / "alpaca.json", rows)
    assert {e.prompt for e in task_of(path).examples("train", 40)} >= {"Add 1\n\nto 1", "Add 2"}
    task = task_of(path, template=r"Q: {instruction} {{{input}}}\n")
    prompts = {each.prompt for split in SPLITS for each in task.examples(split, 40)}
    assert prompts >= {"Q: Add 2 {}\n", "Q: Add 3 {to 1}\n"}
    del rows[0]["input"]
    same = task_of(write(tmp_path / "first_lacks_input.jsonl", rows))
    assert same.content == task_of(path).content


# -- chats --------------------------------------------------------------------------------------------------


def test_a_chat_is_encoded_with_the_models_template_and_without_one_as_lines(tmp_path: Path) -> None:
    task = task_of(write(tmp_path / "chats.jsonl", CHATS))
    tokenizer = hub_folder.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    example = next(e for e in task.examples("train", 60) if e.answer == "It is 6")

    def parts() -> tuple[str, str]:
        encoded = task.encode(example, tokenizer)
        answer = [label for label in encoded.labels if label != IGNORE_INDEX]
        return tokenizer.decode(encoded.ids[: encoded.prompt_length]), tokenizer.decode(answer)

    assert parts() == ("system: Add.\nuser: 3 + 3\nassistant:", " It is 6<eos>")
    tokenizer.chat_template = CHATML
    prompt = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n3 + 3<|im_end|>\n<|im_start|>assistant\n"
    assert parts() == (prompt, "It is 6<|im_end|><eos>")
    tokenizer.eos_token = "<|im_end|>"
    assert parts() == (prompt, "It is 6<|im_end|>"), "the end of the turn is the end token"
    for answer in ("d", "end", "assistant"):
        example = replace(example, answer=answer)
        assert parts() == (prompt, f"{answer}<|im_end|>"), "the template's own text is no answer"


def test_an_image_may_have_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    for number in range(60):
        place = tmp_path / "colors" / ("red", "green")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"\udcfc{number}.png").write_bytes(picture(number, number % 2))
    task = task_of(tmp_path / "colors")
    (first,) = task.examples("train", 1)
    assert first.image is not None
    assert "/\\udcfc" in first.image.name
    assert first.image.read()


# -- training -----------------------------------------------------------------------------------------------


def resolve(store: Store, source: Path, model: Path, **options: Any) -> Configuration:
    """Return the configuration of a short study with --data."""
    typed = StudyOptions(
        data=(str(source),),
        model=str(model),
        variants=("lora",),
        rank=4,
        steps=hub_folder.STEPS,
        batch_size=4,
        evaluations=2,
        **options,
    )
    _, (template,) = resolve_one_task(typed, store.bases)
    return replace(template, optimizer=replace(template.optimizer, learning_rate=1e-2))


def train_elsewhere(store: Store, source: Path, configuration: Configuration) -> None:
    """Prepare the data, remove the user's files, and train in a process that has never seen them."""
    write_own_files([configuration], store.data)
    prepare_datasets([configuration], store.bases, store.data, lambda line: None)
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    tasks._own_tasks.clear()
    load = lambda choice, task: loading.load_base_model(choice, store.bases, "cpu", task)  # noqa: E731
    train(Script(leases([configuration])), store, load_base_model=load)


@pytest.mark.parametrize("metric", [None, "loss", "token_f1"])
def test_a_csv_is_trained_on_where_the_file_is_not(tmp_path: Path, store: Store, metric: str | None) -> None:
    model = hub_folder.llama(tmp_path / "model")
    options: dict[str, Any] = {"metric": metric}
    if metric == "token_f1":
        options |= {"max_new_tokens": 4}
    source = write(tmp_path / "sums.csv", SUMS)
    configuration = resolve(store, source, model, **options)
    longest = max(len(f"{row['prompt']} {row['completion']}") + 1 for row in SUMS)
    assert configuration.batches.max_length == -(-longest // 8) * 8, (
        "a token is a byte, and one is the end token"
    )
    copy = resolve(store, write(tmp_path / "other" / "copy.jsonl", SUMS), model, **options)
    assert copy.task.name == "copy.jsonl"
    assert copy.fingerprint == configuration.fingerprint
    train_elsewhere(store, source, configuration)
    task = tasks.find(configuration.task, store.data)
    record = get_record(store, configuration)
    hub_folder.assert_went_through(record, task)
    if metric == "loss":
        (last,) = (each.scores for each in record.evaluations if each.split == "test")
        assert last["inverse_perplexity"] == pytest.approx(2.718281828459045 ** -last["loss"])
        assert record.score("test") > record.baseline_scores["test"]["inverse_perplexity"] > task.floor


def test_a_folder_of_images_by_class_is_trained_on_where_it_is_not(
    tmp_path: Path, store: Store, image_folders: dict[str, Path]
) -> None:
    source = tmp_path / "colors"
    for number in range(60):
        place = source / ("red", "green", "blue")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number, number % 3))
    listed = [
        {"img": str(p.relative_to(source)), "category": p.parent.name} for p in sorted(source.glob("*/*.png"))
    ]
    content = task_of(source).content
    assert task_of(write(source / "list.csv", listed)).content == content, (
        "equal images, in a file with their paths"
    )
    (source / "list.csv").unlink()
    for hidden in (source / ".cache" / "1.png", source / "red" / ".cache" / "1.png"):
        hidden.parent.mkdir()
        hidden.write_bytes(picture(1, 0))
    (source / "red" / "notes.txt").write_text("red")
    (source / "1.png").write_bytes(picture(1, 0))
    assert task_of(source).content == content
    assert (
        task_of(source).describe().endswith(f"; accuracy; not read: *.txt, images directly in {source.name}")
    )
    configuration = resolve(store, source, image_folders["clip"])
    assert configuration.task.content == content
    train_elsewhere(store, source, configuration)
    task = tasks.find(configuration.task, store.data)
    hub_folder.assert_went_through(get_record(store, configuration), task)
    assert task.labels == ("blue", "green", "red")
