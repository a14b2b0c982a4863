"""The section `training.tasks`."""

from pathlib import Path

import pytest

from megadyn.config import load_config
from megadyn.errors import ConfigError, UserError
from megadyn.training.task_process import refuse_without_package


def load(folder: Path, tasks: str, interval: int = 5):
    (folder / "run.yaml").write_text(
        "{data: {train: d}, tokenizer: {path: byte}, output_dir: out, checkpoint: {interval: "
        f"{interval}}}, training: {{iterations: 20, tasks: {tasks}}}}}"
    )
    return load_config(folder / "run.yaml")


def test_paths_are_expanded_and_names_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    tasks = load(tmp_path, "{names: [piqa, ~/own.yaml, tasks/], interval: 10}").training.tasks
    assert tasks.names == ["piqa", "/home/me/own.yaml", "tasks/"]
    assert not load(tmp_path, "{}").training.tasks.names


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("{interval: 10}", r"tasks\.interval = 10: must be left out without training\.tasks\.names"),
        ("{limit: 3}", r"tasks\.limit = 3: must be left out without"),
        ("{names: [a], interval: 7}", r"tasks\.interval = 7: must be a multiple of checkpoint\.interval = 5"),
        ("{names: [a, a]}", r"must be a list of names or paths, each once"),
        ("{names: ['a,b']}", r"must be a list of names or paths, each once, without commas"),
        ("{names: [a], device: gpu}", r"tasks\.device = 'gpu': must be cpu, cuda or cuda:N"),
        ("{names: [a], batch_size: 0}", r"tasks\.batch_size = 0: must be at least 1"),
        ("{names: [a], num_fewshot: -1}", r"tasks\.num_fewshot = -1: must be at least 0"),
        ("{names: [a], fewshot: 1}", r"training\.tasks\.fewshot: section 'training\.tasks' has no such key"),
        ("[a]", r"training\.tasks: must hold keys \(names,"),
    ],
)
def test_what_does_not_go_is_refused(tmp_path, tasks, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, tasks)


def test_without_checkpoints_only_the_last_can_be_evaluated(tmp_path):
    assert load(tmp_path, "{names: [a]}", interval=0).training.tasks.names == ["a"]
    with pytest.raises(ConfigError, match="which must be above 0"):
        load(tmp_path, "{names: [a], interval: 5}", interval=0)


def test_tasks_need_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_without_package(load(tmp_path, "{}").training.tasks)
    with pytest.raises(
        ConfigError, match=r"must be left out: the lm_eval package is missing \(pip install lm_eval\)"
    ):
        refuse_without_package(load(tmp_path, "{names: [a]}").training.tasks)
