"""The process that evaluates a checkpoint on tasks: what it takes for a task, what it keeps of the scores, and when it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch

from megadyn.errors import UserError
from megadyn.evaluation.tasks import check_device, scores, specs_of
from megadyn.training.task_process import environment, export_beside, problem_in, stop


def test_of_a_group_with_a_score_its_members_are_left_out():
    found = {
        "results": {
            "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "part": {"acc,none": 0.25, "sample_len": 7},
            "loose": {"alias": "loose", "sample_len": 3},
            "one": {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": 0.5, "ok,none": True},
        },
        "group_subtasks": {"whole": ["part"], "loose": ["one"]},
    }
    assert scores(found) == {
        "whole": {"acc": 0.5},
        "one": {"exact_match/strict-match": 1.0, "exact_match_stderr/strict-match": 0.5},
    }


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """lm_eval with the tasks of a folder for its own thousands, which take seconds to list."""
    (tmp_path / "own").mkdir()
    for name in ("easy", "hard"):
        (tmp_path / f"own/{name}.yaml").write_text(f"task: set_{name}\ndataset_path: json\n")
    real = lm_eval.tasks.TaskManager

    def manager(include_path: list[str] | None, include_defaults: bool) -> lm_eval.tasks.TaskManager:
        own = [str(tmp_path / "own")] if include_defaults else []
        return real(include_path=[*own, *(include_path or [])], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    return tmp_path


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_names_patterns_files_and_folders_are_tasks(few_tasks: Path):
    mine = write(
        few_tasks / "mine",
        group="group: both\ntask: [set_easy, mine]\n",
        mine="task: mine\nprocess_docs: !function some.where\n",
        _shared="dataset_path: json\n",
    )
    assert specs_of(["set_*"])[0] == ["set_easy", "set_hard"]
    found = [str(mine / f"{name}.yaml") for name in ("group", "mine")]
    assert specs_of(["set_hard", f"{mine}/"])[0] == ["set_hard", *found]
    assert specs_of([found[1]])[0] == found[1:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "set_eazy",
            "lm_eval has no task 'set_eazy' (did you mean 'set_easy'?); a file of your own needs its path",
        ),
        ("{}/none/", "{}/none: no such file or folder"),
        ("{}/bad/lost.yaml", "lm_eval has no task 'gone'"),
        ("{}/bad/text.yaml", "{}/bad/text.yaml: has neither a key task nor a key group"),
        ("{}/bad/broken.yaml", "{}/bad/broken.yaml: while parsing"),
        ("{}/empty/", "{}/empty: no YAML file there has a key task or group"),
    ],
)
def test_what_is_no_task_is_refused(few_tasks: Path, name: str, message: str):
    write(few_tasks / "bad", lost="group: lost\ntask: [gone]\n", text="just text\n", broken="a: [\n")
    write(few_tasks / "empty", other="a: 1\n")
    with pytest.raises(UserError) as error:
        specs_of([name.format(few_tasks)])
    assert str(error.value).startswith("training.tasks.names: " + message.format(few_tasks))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cpu")
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(
        UserError, match=r"training\.tasks\.device = 'cuda:2': must be cpu, or one of the 2 GPUs"
    ):
        check_device("cuda:2")


def test_the_process_ends_with_the_run(tmp_path: Path):
    code = (
        "from megadyn.evaluation import tasks; tasks.PARENT_S = 0.05; print(flush=True); tasks.end_with({})"
    )
    gone = subprocess.run([sys.executable, "-c", code.format(1)], start_new_session=True, check=False)
    assert gone.returncode == -signal.SIGKILL
    words = [sys.executable, "-c", code.format(os.getpid())]
    waiting = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)
    with waiting.stdout as said:
        said.readline()  # it has begun
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.3)
    output = tmp_path / "iteration-00000010.json"
    export_beside(output).mkdir()
    stop(waiting, output)
    assert waiting.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_it_does_not_take_itself_for_a_rank():
    of_rank = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "a",
        "OMPI_COMM_WORLD_RANK": "3",
    }
    kept = {"PATH": "/bin", "HF_HOME": "/hf", "CUDA_VISIBLE_DEVICES": "0,1", "WORLD_SIZES": "x"}
    found = environment(of_rank | kept | {"OMP_NUM_THREADS": "1"}, threads=4)
    assert found == kept | {"OMP_NUM_THREADS": "4"}


def test_its_failure_is_one_line():
    assert problem_in("note\nerror: no room\nmore\n", 2) == "error: no room"
    assert problem_in("Traceback\n  File\nValueError: bad\n\n", 1) == "ValueError: bad (exit status 1)"
    assert problem_in("", -9) == "it printed nothing (exit status -9)"
