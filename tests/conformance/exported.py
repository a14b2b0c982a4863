"""Promises about what comes out of training: the exported model, the card, the report, the plan and the benchmark."""

import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from megadyn.benchmark import layer as layer_benchmark
from megadyn.checkpoint.export import export
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.evaluation.losses import evaluate
from megadyn.evaluation.saved import load_network, open_saved
from megadyn.hf.convert import write_hf_folder
from megadyn.hf.reader import HfFolder
from megadyn.kinds import DENSE, find_kind
from megadyn.network import Network, routed_layers, thresholds_of
from megadyn.parallel.params import name_of
from megadyn.report.report import write_report
from tests.conformance.checks import Case, config_of, logits_of, modes_of, network_of, tokens_like
from tests.helpers.crew import Crew, lines
from tests.helpers.tiny import ROOT

ALONE = """
import sys
class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Uninstalled())
import json, torch, traceback
from transformers import AutoModelForCausalLM
tokens = torch.tensor({tokens!r})
for folder in {folders!r}:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(tokens).logits
            made = model.generate(tokens[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
        found = {{"logits": logits.tolist(), "made": made.tolist(), "class": type(model).__name__}}
    except Exception:
        found = {{"failed": traceback.format_exc()}}
    print(json.dumps(found))
"""
"""Loads exports as someone would who has neither megadyn nor the kinds' packages."""


def write_export(case: Case, folder: Path, **settings: Any) -> tuple[Network, Any]:
    """A tiny float32 network of the kind, and its export into `folder`; `settings` as of `config_of`."""
    network, config = network_of(case, **settings)
    network = network.float()
    folder.mkdir()
    tensors = [(name_of(param), param.detach()) for param in network.parameters()]
    tensors += [
        (f"model.layers.{index}.causal_router.threshold", threshold.value.float().reshape(1))
        for index, threshold in thresholds_of(routed_layers(network)).items()
    ]
    write_hf_folder(
        folder,
        config.model,
        sorted(tensors),
        tokenizer="byte",
        style="megadyn",
        dtype="float32",
        shard_bytes=10**9,
    )
    return network, config


def the_export_is_the_engine(case: Case, folder: Path) -> None:
    """Logits within 1e-4 of the engine's, under each routing mode; the same with padding, and one token at a time with either
    cache."""
    from transformers import AutoModelForCausalLM

    network, config = write_export(case, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens, _ = tokens_like()
    for mode in modes_of(config):
        model.config.routing_mode = mode
        with torch.no_grad():
            assert_close(
                model(tokens, use_cache=False).logits, logits_of(network, tokens, mode), rtol=0, atol=1e-4
            )
    model.config.routing_mode = "causal"
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        padded = torch.cat([torch.zeros(len(tokens), 5, dtype=torch.int64), tokens], dim=1)
        mask = torch.cat([torch.zeros(len(tokens), 5), torch.ones_like(tokens)], dim=1)
        assert_close(
            model(padded, attention_mask=mask, use_cache=False).logits[:, 5:], whole, rtol=0, atol=1e-4
        )
        assert_close(decoded(model, tokens, 7), whole, rtol=0, atol=1e-4)
        static = model.static_cache(*tokens.shape)
        assert_close(decoded(model, tokens, 7, static), whole, rtol=0, atol=1e-4)


@torch.no_grad()
def decoded(model: Any, tokens: Tensor, first: int, cache: Any = None) -> Tensor:
    """Logits of a prefill of `first` tokens, then of one token after another with the cache, the model's own if none is given."""
    found = []
    for start, end in ((0, first), *((at, at + 1) for at in range(first, tokens.shape[1]))):
        out = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def run_alone(folders: dict[Case, Path]) -> dict[Case, dict[str, Any]]:
    """What each case's export gives in a process of its own, with megadyn and the kinds' packages uninstalled: one process for
    all, as to start one takes seconds."""
    tokens, _ = tokens_like(2)
    packages = {"megadyn", *(find_kind(case.kind).__module__.partition(".")[0] for case in folders)}
    program = ALONE.format(
        packages=sorted(packages),
        folders=[str(folder) for folder in folders.values()],
        tokens=tokens.tolist(),
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=next(iter(folders.values())),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(folders, answers, strict=True))


def the_export_runs_alone(case: Case, folder: Path, found: dict[str, Any]) -> None:
    """Its export into `folder`, of which `found` is what `run_alone` gave, loads, scores and generates without megadyn; read
    back here, it is the same model."""
    assert "failed" not in found, found["failed"][-3000:]
    network, config = network_of(case)
    network, (tokens, _) = network.float(), tokens_like(2)
    assert found["class"] == "MegadynForCausalLM"
    assert_close(torch.tensor(found["logits"]), logits_of(network, tokens, "causal"), rtol=0, atol=1e-4)
    assert torch.tensor(found["made"]).shape == (2, 16)
    again = HfFolder(folder).model
    assert again.layer_types == config.model.layer_types
    assert again.routing.to_export(again) == config.model.routing.to_export(config.model)
    loaded = load_network(open_saved(folder), torch.device("cpu"))
    assert_close(logits_of(loaded, tokens, "causal"), logits_of(network, tokens, "causal"), rtol=0, atol=1e-5)


CONFIG = """
model: {{hidden_size: 32, num_layers: 4, num_heads: 4, num_kv_heads: 2, vocab_size: 259, routing: {routing}}}
data: {{train: {folder}/text, split: [0.8, 0.2, 0]}}
tokenizer: {{path: byte}}
training: {{iterations: 6, global_batch_size: 4, micro_batch_size: 2, sequence_length: 24, eval_interval: 6, eval_samples: 4}}
optimizer: {{warmup_iterations: 2}}
checkpoint: {{interval: 3}}
logging: {{interval: 2, tensorboard: false}}
parallel: {{tensor: 2}}
precision: fp32
deepspeed_config: {root}/ds_configs/zero1.json
output_dir: {folder}/out
"""


def a_run_goes_all_the_way(case: Case, folder: Path) -> None:
    """Training on two tensor ranks by the main job, its plan, export, evaluation, card, report and benchmark."""
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(folder / "text", "<u2") as writer:
        for _ in range(20):
            writer.add(torch.randint(1, 250, (60,), generator=generator).numpy().astype("<u2"), [60], [1])
        writer.finish()
    routing = json.dumps({"kind": case.kind} | dict(case.keys))
    (folder / "config.yaml").write_text(CONFIG.format(routing=routing, folder=folder, root=ROOT))
    crew = Crew(folder / "config.yaml", world=2)
    assert crew.wait() == [0, 0], crew.output()[-3000:]
    kind, run = find_kind(case.kind), folder / "out"
    (last,) = [line for line in lines(run) if line.get("iteration") == 6 and "lm_loss" in line]
    assert (kind.name == DENSE) == (not last["routing"]), "routed layers report"
    assert last["model_tflops"] > 0
    export(run / "checkpoints" / "iteration-00000006", folder / "hf")
    card = (folder / "hf" / "README.md").read_text()
    assert (kind.title in card and kind.sentence.split(".")[0] in card) or kind.name == DENSE
    found = evaluate(folder / "hf", folder / "text", modes=("causal",), samples=4)
    assert 4.0 < found["causal"] < 7.0
    write_report([run], folder / "report.html", tokens=12)
    page = (folder / "report.html").read_text()
    assert escape(config_of(case).model.routing.describe()) in page
    layer_benchmark.main(
        [
            "--models",
            case.kind,
            "--hidden",
            "64",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--ffn",
            "128",
            "--vocab",
            "97",
            "--sequence",
            "64",
            "--batch",
            "1",
            "--rounds",
            "1",
            "--warmup",
            "1",
        ]
    )
