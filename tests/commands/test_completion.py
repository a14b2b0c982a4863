"""The scripts that complete commands, as a shell runs them."""

import re
import shutil
import subprocess

import pytest

from megadyn.commands import COMMANDS, main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Shell -> its script, made once: that imports every command."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
    return folder


def completed(script, folder, *words):
    """What bash offers for the last of `words`."""
    text = f"""
source {script}
COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
name=$(complete -p megadyn | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$name" megadyn "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in done.stdout.splitlines()} - {""}


def test_bash_completes_commands_options_choices_and_files(scripts, tmp_path):
    script = scripts / "bash"
    assert completed(script, tmp_path, "megadyn", "") >= set(COMMANDS)
    assert completed(script, tmp_path, "megadyn", "ev") == {"evaluate"}
    assert completed(script, tmp_path, "megadyn", "train", "--proc") == {"--processes"}
    assert completed(script, tmp_path, "megadyn", "evaluate", "--routing", "") == {"topk", "causal", "both"}
    assert completed(script, tmp_path, "megadyn", "config", "sc") == {"schema"}
    (tmp_path / "run.yaml").write_text("")
    assert completed(script, tmp_path, "megadyn", "train", "ru") == {"run.yaml"}


def test_zsh_has_a_function_with_every_command(scripts, tmp_path):
    text = (scripts / "zsh").read_text()
    assert text.startswith("#compdef megadyn")
    assert all(re.search(rf"^ +{name}:'", text, re.M) for name in COMMANDS)
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n", scripts / "zsh"], check=True, timeout=60)


def test_another_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
