"""Check that the tests of the promises detect faults: change the program in one place, expect a failed test.

    python tests/promises/mutations.py              all mutations (nightly)
    python tests/promises/mutations.py resume lock  those with one of the words in their name or their test's

Each mutation replaces one text of one file in a copy of the working tree. The tests run in the unchanged copy
first, where all must pass. The test of each mutation then runs with this mutation, and must fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A fault of the program, and the test that must detect it.

    Args:
        name: The fault, in a few words.
        file: The file to change, relative to the root of the repository.
        old: A text that occurs exactly once in the file.
        new: The replacement.
        test: The test that must fail: `test_NN_name.py::test_name`, in this folder.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


# 1. The dry run.
MUTATIONS: list[Mutation] = [
    Mutation(
        "what is known is trained again",
        "orchestrator/launch/study.py",
        "            record = self.settled(each.fingerprint)\n",
        "            record = None\n",
        "test_01_dry_run.py::test_a_small_dry_run_is_trained_once",
    ),
    Mutation(
        "the run of a finished configuration looks killed",
        "orchestrator/record/mlflow.py",
        'STATUS = {"finished": "FINISHED"',
        'STATUS = {"finished": "KILLED"',
        "test_01_dry_run.py::test_a_small_dry_run_is_trained_once",
    ),
    Mutation(
        "two seeds are one configuration",
        "orchestrator/study/configuration.py",
        "        return hashlib.sha256(canonical_json(data)).hexdigest()\n",
        '        data["seed"] = 0\n        return hashlib.sha256(canonical_json(data)).hexdigest()\n',
        "test_01_dry_run.py::test_one_more_seed_trains_only_what_is_new",
    ),
]

# 2. Faults.
MUTATIONS += [
    Mutation(
        "an interrupted lane is not saved",
        "orchestrator/finetune/engine/leasing.py",
        "        self.recorder.save_checkpoint(lane)\n",
        "",
        "test_02_faults.py::test_ctrl_c_once_and_twice",
    ),
    Mutation(
        "a resumed lane begins with fresh moments",
        "orchestrator/finetune/engine/lane.py",
        "        self._restore_optimizer(checkpoint.moments)\n",
        "",
        "test_02_faults.py::test_ctrl_c_once_and_twice",
    ),
    Mutation(
        "two commands run one study: no lock",
        "orchestrator/launch/run.py",
        "ray_cluster.exclusive_lock(study.folder / LOCK_FILE, refusal)",
        'ray_cluster.exclusive_lock(study.folder / f"{LOCK_FILE}-{id(object())}", refusal)',
        "test_02_faults.py::test_ctrl_c_once_and_twice",
    ),
]

# 3. Lanes.
MUTATIONS += [
    Mutation(
        "a failed lane takes its lane group with it",
        "orchestrator/finetune/engine/loop.py",
        "                    self.recovery.fail(lane, outcome)\n",
        "                    _ = [self.recovery.fail(each, outcome) for each, _ in outcomes]\n",
        "test_03_lanes.py::test_a_lane_that_fails_is_a_result",
    ),
    Mutation(
        "the lanes of a group compute with each other's tensors",
        "orchestrator/finetune/engine/lane_group.py",
        "fingerprint for lane in lanes],\n            [lane.step",
        "fingerprint for lane in reversed(lanes)],\n            [lane.step",
        "test_03_lanes.py::test_a_lane_alone_equals_the_lane_beside_others_to_the_bit",
    ),
    Mutation(
        "gradients are not clipped",
        "orchestrator/finetune/engine/lane.py",
        "        if clip_factor < 1:\n",
        "        if clip_factor < 0:\n",
        "test_03_lanes.py::test_twenty_steps_equal_those_of_trainer_and_peft",
    ),
    Mutation(
        "weights do not decay",
        "orchestrator/finetune/engine/lane.py",
        "decay = options.weight_decay if has_weight_decay(name, self.adapters) else 0.0",
        "decay = 0.0",
        "test_03_lanes.py::test_twenty_steps_equal_those_of_trainer_and_peft",
    ),
]

# 4. Search and early stopping.
MUTATIONS += [
    Mutation(
        "a larger design draws other points",
        "orchestrator/execution/search.py",
        "draw_sequence(self.sampler, dimensions, replicate)",
        "draw_sequence(self.sampler, dimensions, self.points)",
        "test_04_search.py::test_a_design_gives_each_variant_as_many_points_and_grows_from_what_it_has",
    ),
    Mutation(
        "the last variant of a design has a smaller budget",
        "orchestrator/execution/search.py",
        "if not group.num_remaining:",
        "if group.num_remaining <= (group is groups[-1]):",
        "test_04_search.py::test_a_design_gives_each_variant_as_many_points_and_grows_from_what_it_has",
    ),
    Mutation(
        "early stopping ends the best lanes",
        "orchestrator/execution/schedulers.py",
        '"mode": "min"',
        '"mode": "max"',
        "test_04_search.py::test_asha_stops_what_is_worse_and_keeps_the_best",
    ),
    Mutation(
        "a continued search does not count the points of its journal",
        "orchestrator/execution/search.py",
        "            self._register(group, configuration)\n\n    def draw_ahead",
        "            self.configurations[configuration.fingerprint] = configuration\n\n    def draw_ahead",
        "test_04_search.py::test_a_killed_search_goes_on_without_a_repeated_point",
    ),
]

# 5. The questions.
MUTATIONS += [
    Mutation(
        "the best rate of a curve is chosen on test",
        "orchestrator/analyze/runs.py",
        '        "validation_score": validation,\n',
        '        "validation_score": finite(record.score("test")),\n',
        "test_05_questions.py::test_validation_chooses_the_rate_and_the_test_score_is_that_of_the_chosen_rate",
    ),
    Mutation(
        "a tuning is chosen on test",
        "orchestrator/analyze/curves.py",
        'best_index(own["validation_score"].where(eligible).to_numpy())',
        'best_index(own["test_score"].where(eligible).to_numpy())',
        "test_05_questions.py::test_a_tuning_is_chosen_on_validation_and_not_on_test",
    ),
    Mutation(
        "a difference above the margin is called equivalent",
        "orchestrator/analyze/stats.py",
        "lambda low, high, margin: -margin < low and high < margin",
        "lambda low, high, margin: -margin < low",
        "test_05_questions.py::test_tuned_lora_against_its_variants",
    ),
    Mutation(
        "a collapsed run counts as usable",
        "orchestrator/analyze/runs.py",
        '.mask(collapsed, "collapsed")',
        "",
        "test_05_questions.py::test_runs_above_the_cliff_are_counted_as_collapsed_or_diverged",
    ),
    Mutation(
        "the test that the rate matters more has the wrong sign",
        "orchestrator/analyze/effects.py",
        "p_more = float(special.stdtr(n - 1, (margin - mean) / error))",
        "p_more = float(special.stdtr(n - 1, (mean - margin) / error))",
        "test_05_questions.py::test_what_matters_most",
    ),
    Mutation(
        "the published variants are ranked from the worst",
        "orchestrator/analyze/published.py",
        'rank(method="min", ascending=False)',
        'rank(method="min", ascending=True)',
        "test_05_questions.py::test_the_survey_ranks_lora_third_on_gsm8k_and_seventh_on_glue",
    ),
]

# 6. Data, tasks, variants and models of one's own.
MUTATIONS += [
    Mutation(
        "a wrong value ends with the exit status of a failure",
        "orchestrator/util/command.py",
        "EXIT_USAGE = 2",
        "EXIT_USAGE = 1",
        "test_06_bad_input.py::test_a_process_of_its_own_is_refused_in_the_same_way",
    ),
    Mutation(
        "an error names the row before the wrong one",
        "orchestrator/finetune/sources/data_files.py",
        'position = f"row {row}"',
        'position = f"row {row - 1}"',
        "test_06_bad_input.py::test_wrong_data_are_refused_with_file_and_row[a class that is rare]",
    ),
    Mutation(
        "an error does not name the line of the file of options",
        "orchestrator/study/config.py",
        'raise UsageError(f"{path}, line {line}: {error}") from None',
        "raise",
        "test_06_bad_input.py::test_a_wrong_file_of_options_is_refused_with_its_line[a rank of zero]",
    ),
    Mutation(
        "rows of every split are trained on",
        "orchestrator/finetune/tasks/data_splits.py",
        "numbers = np.maximum(file.split_numbers, 0)",
        "numbers = np.zeros_like(file.split_numbers)",
        "test_06_own_things.py::test_the_plan_of_data_shows_their_columns_splits_and_classes[mails.csv]",
    ),
]

# 7. Export.
MUTATIONS += [
    Mutation(
        "an adapter of another scale",
        "variants/low_rank.py",
        '"lora_alpha": alpha if',
        '"lora_alpha": 2 * alpha if',
        "test_07_export.py::test_an_adapter_loads_in_peft_and_has_the_scores_of_its_record[lora]",
    ),
    Mutation(
        "a merge that replaces the weight",
        "variants/merging.py",
        "view.weight.copy_(_sum(view.weight, update))",
        "view.weight.copy_(update)",
        "test_07_export.py::test_a_merged_model_is_a_model_of_transformers_with_the_scores_of_the_record",
    ),
    Mutation(
        "the best lane of another variant",
        "orchestrator/export/lane_choice.py",
        "if goal[1] == variant}",
        "if goal[1] != variant}",
        "test_07_export.py::test_the_tensors_of_a_lane_load_by_the_lines_of_the_card",
    ),
]

# 8. Variants.
MUTATIONS += [
    Mutation(
        "a variant without its paper",
        "variants/initialization/pissa.py",
        'paper = "Meng et al., arXiv 2404.02948"',
        'paper = ""',
        "test_08_variants.py::test_the_catalogue_names_its_variants_with_paper_and_year_and_two_controls",
    ),
    Mutation(
        "a law about the start that accepts any",
        "variants/testing/__init__.py",
        "assert torch.equal(lane, base)",
        "assert lane.shape == base.shape",
        "test_08_variants.py::test_the_check_of_the_laws_names_the_law_that_a_variant_breaks[start]",
    ),
    Mutation(
        "a law about gradients that accepts none",
        "variants/testing/__init__.py",
        "assert reached == expected,",
        "assert reached <= expected,",
        "test_08_variants.py::test_the_check_of_the_laws_names_the_law_that_a_variant_breaks[gradient]",
    ),
]

# 9. MLflow and other trackers.
MUTATIONS += [
    Mutation(
        name="the ranking is upside down",
        file="orchestrator/record/mlflow.py",
        old="mean = fsum(scores) / len(scores)",
        new="mean = -fsum(scores) / len(scores)",
        test="test_09_trackers.py::test_the_same_command_adds_no_run_and_its_link_leads_to_the_ranked_answer",
    ),
    Mutation(
        name="sync brings the first missing run only",
        file="orchestrator/record/maintenance.py",
        old="for record in records:\n",
        new="for record in records[:1]:\n",
        test="test_09_trackers.py::test_a_database_that_was_removed_is_made_again",
    ),
    Mutation(
        name="a second driver makes a second run of the study",
        file="orchestrator/record/mlflow.py",
        old="self._study_run = self._study_run or run.info.run_id",
        new='self._study_run = ""',
        test="test_09_trackers.py::test_a_server_that_goes_down_loses_nothing",
    ),
]

# 10. Clusters.
MUTATIONS += [
    Mutation(
        "results stay on the head's own disk",
        "cluster.yaml",
        "ORCHESTRATOR_OUTPUT=/shared/results",
        "ORCHESTRATOR_OUTPUT=/root/results",
        "test_10_cluster.py::test_a_study_on_the_head_trains_on_the_workers_and_its_results_come_back",
    ),
    Mutation(
        "a trainer stays on a drained node",
        "orchestrator/execution/trainer_worker.py",
        "while node_id not in draining_node_ids():",
        "while True:",
        "test_10_cluster.py::test_a_worker_that_dies_and_one_that_is_taken_back_change_no_result",
    ),
    Mutation(
        "a spot notice is overlooked",
        "orchestrator/cluster/spot.py",
        "if seconds is not None and",
        "if seconds is None and",
        "test_10_cluster.py::test_a_worker_that_dies_and_one_that_is_taken_back_change_no_result",
    ),
    Mutation(
        "a folder that the workers do not see is accepted",
        "orchestrator/cluster/check.py",
        '    if failures:\n        raise UsageError(\n            f"{store}:',
        '    if not store:\n        raise UsageError(\n            f"{store}:',
        "test_10_cluster.py::test_a_folder_that_the_workers_do_not_see_is_named",
    ),
]

# 11. Programs that a model wrote.
MUTATIONS += [
    Mutation(
        name="a program's memory is not limited",
        file="orchestrator/finetune/grading/sandbox/isolation.py",
        old='(resource.RLIMIT_AS, limits["memory_bytes"]),',
        new="",
        test="test_11_programs.py::test_memory_files_and_answers_are_limited",
    ),
    Mutation(
        name="a program gets the user's environment",
        file="orchestrator/finetune/grading/sandbox/run.py",
        old="env=_ENVIRONMENT,",
        new="env=dict(os.environ),",
        test="test_11_programs.py::test_a_program_reads_no_secret_and_no_file_of_the_user",
    ),
    Mutation(
        name="system calls are not filtered",
        file="orchestrator/finetune/grading/sandbox/isolation.py",
        old="        install_seccomp_filter()\n",
        new="",
        test="test_11_programs.py::test_system_calls_that_reach_beyond_the_program_are_refused",
    ),
    Mutation(
        name="a program that exits with code 0 has passed",
        file="orchestrator/finetune/grading/sandbox/run.py",
        old='return ProgramResult(False, f"{PROGRAM_ENDED} (exit code {program})")',
        new='return ProgramResult(program == 0, f"{PROGRAM_ENDED} (exit code {program})")',
        test="test_11_programs.py::test_no_program_passes_without_a_right_answer",
    ),
]

# 12. Security.
MUTATIONS += [
    Mutation(
        name="Ray listens on all addresses",
        file="orchestrator/execution/ray_cluster.py",
        old='"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",',
        new='"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",',
        test="test_12_security.py::test_a_study_listens_on_loopback_only",
    ),
    Mutation(
        name="the secrets of the environment are written",
        file="orchestrator/util/redaction.py",
        old="text = text.replace(value, mask(value))",
        new="text = text.replace(value, value)",
        test="test_12_security.py::test_no_file_and_no_output_has_a_secret",
    ),
    Mutation(
        name="a typed password stays on the command line",
        file="orchestrator/util/redaction.py",
        old="ctypes.memmove(first, hidden, len(hidden))",
        new="pass",
        test="test_12_security.py::test_no_command_line_has_a_secret",
    ),
    Mutation(
        name="a token that everybody may read stays open",
        file="orchestrator/execution/ray_cluster.py",
        old="path.chmod(path.stat().st_mode & 0o700)",
        new="path.chmod(path.stat().st_mode)",
        test="test_12_security.py::test_a_token_that_everybody_may_read_is_closed_and_kept",
    ),
    Mutation(
        name="a pickle that runs code is taken for weights",
        file="orchestrator/finetune/models/catalogue.py",
        old="weights_only=True",
        new="weights_only=False",
        test="test_12_security.py::test_a_model_with_a_pickle_that_runs_code_is_refused",
    ),
]

# 13. What is installed.
MUTATIONS += [
    Mutation(
        "the wheel has no cluster.yaml",
        "pyproject.toml",
        '"cluster.yaml" = "orchestrator/project/cluster.yaml"\n',
        "",
        "test_13_package.py::test_both_distributions_hold_every_file_of_the_program",
    ),
    Mutation(
        "nodes get files that are not installed",
        "orchestrator/experiments.py",
        "path if path.exists() else",
        "path or",
        "test_13_package.py::test_the_installed_program_has_its_commands_files_and_a_cluster[uv]",
    ),
    Mutation(
        "a user's change of a script has no effect",
        "orchestrator/cli/program.py",
        "experiments.use_script(experiment, sys.argv[0])",
        "pass",
        "test_13_package.py::test_the_installed_program_has_its_commands_files_and_a_cluster[uv]",
    ),
]


def copy_working_tree(to: Path) -> None:
    """Copy the files that git tracks or would track."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def passes(tests: list[str], tree: Path) -> tuple[bool, str]:
    """Run tests of this folder in a copy of the working tree; return whether all pass, and the output."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PROMISES_CACHE": str(tree.parent)}
    environment["HANG_SECONDS"] = "300"  # a test that waits for what a mutation prevents ends after it
    paths = [f"tests/promises/{test}" for test in tests]
    done = subprocess.run([*command, *paths], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: a test failed; others: no test was run
    return done.returncode == 0, done.stdout + done.stderr


def survivors(mutations: list[Mutation]) -> list[str]:
    """Apply each mutation alone; return the names of those that their tests did not detect."""
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_working_tree(tree)
        whole, printed = passes(sorted({m.test for m in mutations}), tree)
        assert whole, f"the tests fail without a mutation:\n{printed}"
        for mutation in mutations:
            path = tree / mutation.file
            before = path.read_text()
            path.write_text(before.replace(mutation.old, mutation.new))
            passed, _ = passes([mutation.test], tree)
            path.write_text(before)
            print(f"{'MISSED' if passed else 'caught'}  {mutation.name} ({mutation.test})", flush=True)
            missed += [mutation.name] if passed else []
    return missed


def main() -> None:
    """Run the mutations that the command line selects, or all of them."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name or word in m.test for word in words)]
    missed = survivors(chosen)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
