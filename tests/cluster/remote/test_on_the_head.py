"""Defaults of a study on a cluster's head, and the translation of a command for the head."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tyro
import yaml

from orchestrator.cli.arguments import parse_options
from orchestrator.cluster.remote import command_line, source_digest
from orchestrator.cluster.remote.study_folders import find_study_folders
from orchestrator.cluster.remote.uploads import Uploads
from orchestrator.execution.ray import autoscaler
from orchestrator.launch.script_options import ComparisonOptions, CurveOptions
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracking_uri import default_uri, resolve_uri, study_uri
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

SCRIPT = source_digest.PROJECT_ROOT / "experiments" / "lr_sensitivity.py"
GPUS = {
    "max_workers": 8,
    "available_node_types": {"gpu": {"max_workers": 8, "resources": {"CPU": 4, "GPU": 1}}},
}
CPUS = {"max_workers": 8, "available_node_types": {"cpu": {"max_workers": 8, "resources": {"CPU": 4}}}}


@pytest.mark.parametrize(
    ("cluster_file", "typed", "gpus", "seconds"),
    [
        (GPUS, StudyOptions(), 1.0, 1800.0),
        (GPUS, StudyOptions(gpus_per_worker=0.5, trainer_timeout=60.0), 0.5, 60.0),
        (GPUS, StudyOptions(gpus_per_worker=0.0), 0.0, None),
        (GPUS, StudyOptions(dry_run=True), None, None),
        (GPUS, StudyOptions(dry_run=True, gpus_per_worker=1.0), 1.0, 1800.0),
        (CPUS, StudyOptions(), None, None),
        (None, StudyOptions(), None, None),
    ],
)
def test_a_study_waits_for_gpu_nodes_that_the_autoscaler_can_start(
    cluster_file: object,
    typed: StudyOptions,
    gpus: float | None,
    seconds: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.77.0.2:6379")
    if cluster_file:
        (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(cluster_file))
    adapted = autoscaler.adapt_options(typed)
    assert (adapted.gpus_per_worker, adapted.trainer_timeout) == (gpus, seconds)


def test_results_go_where_the_head_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_OUTPUT", raising=False)
    assert StudyOptions().output == Path("results")
    monkeypatch.setenv("ORCHESTRATOR_OUTPUT", str(tmp_path))
    assert StudyOptions().output == tmp_path
    assert StudyOptions().store_folder == tmp_path / "store"
    assert StudyOptions(output=Path("other")).output == Path("other")


def test_mlflow_s_own_variable_is_the_default_and_its_password_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    one, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "other"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, store) == default_uri(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one)
    assert resolve_uri(None, store) == one
    assert resolve_uri(other, store) == other
    assert study_uri(other, store) == other
    assert study_uri("", store) == default_uri(store), "the study names no server"
    secret = "http://user:pl4nted@localhost:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    assert study_uri("http://user:***@localhost:9", store) == secret
    with pytest.raises(UsageError, match=r"^MLFLOW_TRACKING_URI .*127.0.0.1|localhost") as refused:
        resolve_uri(None, store)
    assert "pl4nted" not in str(refused.value)


def test_the_translated_options_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    command = (
        "--on cluster.yaml --output elsewhere --search=optuna --space rank=4,8 warmup=0:0.1 "
        "--set weight_decay=0.01 --alpha 0.1 --gradient-checkpointing --max-hours 1e-05 "
        "--tracking_uri http://127.0.0.1:5000 --points 40"
    )
    both = (tyro.conf.FlagCreatePairsOff,)
    typed = tyro.cli(StudyOptions, args=command.split(), config=both)
    script, *there = command_line.remote_command(typed, Uploads())
    assert script == "experiments/lr_sensitivity.py"
    assert not {"--on", "--output"} & set(there)
    again = tyro.cli(StudyOptions, args=there, config=both)
    assert command_line.build_arguments(again, Uploads()) == there
    assert (again.search, again.space, again.max_hours) == ("optuna", ("rank=4,8", "warmup=0:0.1"), 1e-5)
    assert command_line.build_arguments(StudyOptions(), Uploads()) == []


@pytest.mark.parametrize(
    "command",
    [
        "--preset published-gsm8k-r128 --plan",
        "--preset published-gsm8k-r128 --rank 8 --set warmup=0.1 --steps 7 --variants lora pissa --plan",
        "--preset published-images --epochs 2 --seeds 3 --set rank=4 --plan",
    ],
)
def test_a_preset_and_what_replaces_it_mean_the_same_there(command: str) -> None:
    typed = parse_options("", CurveOptions, command.split())
    assert parse_options("", CurveOptions, command_line.build_arguments(typed, Uploads())) == typed


def test_options_of_a_script_and_of_the_check_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line.build_arguments(ComparisonOptions(replicates=20), Uploads()) == ["--replicates", "20"]
    module = source_digest.PROJECT_ROOT / "orchestrator" / "__main__.py"
    for program in (str(module), "bin/lora-orchestrator"):
        for names in (["check"], ["check", "tuned"]):
            monkeypatch.setattr(sys, "argv", [program, *names, "--rank", "4"])
            words = command_line.remote_command(CurveOptions(rank=4), Uploads())
            assert words == ["-m", "orchestrator", *names, "--rank", "4"]
    monkeypatch.setattr(sys, "argv", ["bin/lora-orchestrator", "study", "--rank", "4"])
    assert command_line.study_key(CurveOptions(rank=4, task=("letters",))) == "lr_sensitivity-letters"


def test_files_of_the_user_get_paths_on_the_head_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the project keep their paths, and so do files that are not on this machine."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("NAME = 'own'")
    Path("rows.csv").write_text("text,label\n")
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    uploads = Uploads()
    own, rows, model = (uploads.add(Path(name)) for name in ("own.py", "rows.csv", "model"))
    script = SCRIPT.relative_to(source_digest.PROJECT_ROOT).as_posix()

    options = StudyOptions(task=(str(SCRIPT), "own.py", "/shared/own.py", "letters"), model="model")
    words = ["--task", script, own, "/shared/own.py", "letters", "--model", model]
    assert command_line.build_arguments(options, uploads) == words
    options = StudyOptions(variants=("lora", "own.py"), set=("own.py.factor=4", "lora.rank=2", "alpha=3"))
    words = ["--variants", "lora", own, "--set", f"{own}.factor=4", "lora.rank=2", "alpha=3"]
    assert command_line.build_arguments(options, uploads) == words
    options = StudyOptions(data=("rows.csv", "/shared/rows.csv", "org/name@revision"))
    words = ["--data", rows, "/shared/rows.csv", "org/name@revision"]
    assert command_line.build_arguments(options, uploads) == words
    options = StudyOptions(data=("rows.csv",), test_data="rows.csv")
    assert command_line.build_arguments(options, uploads) == ["--data", rows, "--test-data", rows]

    Path("rows.csv").write_text("text,label\na,b\n")
    assert Uploads().add(Path("rows.csv")) != rows
    Path("model", "tokenizer.json").write_text("{}")
    assert Uploads().add(Path("model")) != model


def test_differing_sources_are_named_and_additional_files_on_the_head_are_not(tmp_path: Path) -> None:
    for path, text in (("orchestrator/a.py", "a"), ("variants/b.py", "b"), ("constraints.txt", "c")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    here = source_digest.file_digests(tmp_path)
    assert set(here) == {"orchestrator/a.py", "variants/b.py", "constraints.txt"}
    (tmp_path / "orchestrator" / "a.py").write_text("other")
    (tmp_path / "variants" / "b.py").unlink()
    (tmp_path / "variants" / "old.py").touch()
    assert source_digest.differing_files(here, source_digest.file_digests(tmp_path)) == [
        "orchestrator/a.py",
        "variants/b.py",
    ]


def test_the_studies_that_a_command_has_written_are_found(tmp_path: Path) -> None:
    for name, command in (("x-tune", "python x"), ("x-confirm", "python x"), ("y", "python y")):
        StudyFile(name, "?", command).write(tmp_path / name)
    assert find_study_folders("python x", tmp_path) == [str(tmp_path / "x-confirm"), str(tmp_path / "x-tune")]
    assert find_study_folders("python z", tmp_path) == []
