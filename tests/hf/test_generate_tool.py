"""tools/generate.py on a tiny exported folder, and its answers to bad input."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megadyn.errors import run_tool
from tests.hf.tiny_models import VOCABULARY, tiny_model

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    tiny_model("dtf4").save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def run(tool, capsys, *args):
    """(exit status, standard output, standard error)"""
    status = run_tool(lambda: tool.main([str(arg) for arg in args]))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_continues_a_prompt(tool, folder, capsys, routing):
    args = ("--model", folder, "--prompt", "w3 w5 w7", "--max-new-tokens", 6, "--routing", routing, "--json")
    status, out, _ = run(tool, capsys, *args)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert out.startswith("w3 w5 w7" + result["completion"])
    assert (result["prompt_tokens"], result["new_tokens"]) == (3, 6)
    if routing == "causal":
        everything, some = result["cached_tokens"][:2]
        assert everything == 8  # the last new token is not run
        assert some < 8
    else:
        assert result["cached_tokens"] is None
    again = json.loads(run(tool, capsys, *args)[1].splitlines()[-1])
    other = json.loads(run(tool, capsys, *args, "--seed", 1, "--temperature", 5)[1].splitlines()[-1])
    assert again["completion"] == result["completion"] != other["completion"]


def test_bad_input_is_one_sentence(tool, folder, capsys, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False, "attention_bias": False})
    )
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "config.json").write_text(json.dumps(config | {"routing": config["routing"] | {"kind": "mop"}}))
    typed = shutil.copytree(folder, tmp_path / "typed")
    (typed / "config.json").write_text(json.dumps(config | {"dtype": True}))
    wordless = shutil.copytree(folder, tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    for args, message in [
        (["--model", tmp_path / "nowhere", "--prompt", "w1"], "no such folder"),
        (["--model", tmp_path, "--prompt", "w1"], "no config.json there"),
        (["--model", broken, "--prompt", "w1"], "cannot be loaded"),
        (["--model", wordless, "--prompt", "w1"], "cannot be loaded"),
        (["--model", typed, "--prompt", "w1"], "cannot be loaded"),
        (["--model", odd, "--prompt", "w1"], "routing.kind = 'mop'"),
        (
            ["--model", other, "--prompt", "w1"],
            "12 unexpected keys in its weights, e.g. model.layers.0.self_attn.k_proj.bias",
        ),
        (["--model", folder, "--prompt", ""], "--prompt is empty"),
        (
            ["--model", folder, "--prompt", "w1", "--max-new-tokens", 128],
            "more than the model's maximum of 128",
        ),
        (["--model", folder, "--prompt", "w1", "--max-new-tokens", 0], "must be at least 1"),
        (["--model", folder, "--prompt", "w1", "--top-p", 0], "must be in (0, 1]"),
        (["--model", folder, "--prompt", "w1", "--temperature", -1], "must be 0 or more"),
        (["--model", folder, "--prompt", "w1", "--routing", "random"], "invalid choice: 'random'"),
        (["--model", folder, "--prompt", "w1", "--seed", str(2**64)], "below 2^63"),
        (["--model", folder, "--prompt", "w1\udcff"], "--prompt is not valid UTF-8"),
        (["--prompt", "w1"], "required: --model"),
    ]:
        status, out, err = run(tool, capsys, *args)
        assert (status, out) == (2, "")
        *stages, last = err.splitlines()
        assert last.startswith("error: ") and message in last
        assert all(stage.startswith(("loading ", "generating ")) for stage in stages)
