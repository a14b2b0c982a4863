"""Models for the generation benchmark: exports of every kind with random weights, an export folder, transformers' Qwen2."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadyn.benchmark.models import REFERENCE, build, config_of, set_shares
from megadyn.config import ModelConfig
from megadyn.config.config_map import from_hf_config, to_dense_config, to_hf_config
from megadyn.errors import UserError
from megadyn.evaluation.losses import evaluate
from megadyn.files import read_json
from megadyn.hf.reader import THRESHOLD
from megadyn.kinds import DENSE, capacity_count
from megadyn.network import Network
from megadyn.parallel.params import name_of
from megadyn.planning.flops import dense_twin

CALIBRATED = (4, 512)
"""Number of sequences, and largest number of tokens of each, used to set thresholds."""

WIDER = 8.0
"""Factor on the initial weights of the feed-forwards' output projections. Attention's are left as they are: its output
is nearly the same for all tokens of a row, so it would separate rows, not tokens."""


@dataclass
class Served:
    """A model as transformers serves it."""

    name: str
    model: Any
    config: ModelConfig
    loss: float | None = None
    """In nats per token, if a dataset was given."""
    compiled: Any = None

    @property
    def is_routed(self) -> bool:
        return hasattr(self.model.config, "routed_layer_types")

    @property
    def step(self) -> Any:
        """What decodes: the model, or its compiled form."""
        return self.compiled or self.model

    def compile(self, device: torch.device) -> None:
        """Compiles decoding steps with static caches, each as one graph; on a GPU with CUDA graphs."""
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.compiled = torch.compile(self.model.forward, fullgraph=True, dynamic=False, mode=mode)

    def static_cache(self, rows: int, columns: int) -> Any:
        if not self.is_routed:
            from transformers import StaticCache

            return StaticCache(config=self.model.config, max_cache_len=columns)
        if not hasattr(self.model, "static_cache"):
            raise UserError(f"--static: {self.name} was exported by an earlier version, export it again")
        return self.model.static_cache(rows, columns)


def served(
    name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, tokens: Tensor
) -> Served:
    """KIND[:CAPACITY] or `qwen2` with random weights at the sizes in `args`. Thresholds are set on `tokens` [B, T].

    Raises UserError for an unknown kind.
    """
    if name == REFERENCE:
        return reference(config_of(DENSE, args).model, device, dtype)
    built = build(name, args, torch.device("cpu"), torch.float32, tokens, [])
    assert isinstance(built.module, Network)
    widen(built.module)
    # Again, because the layers' inputs have changed.
    set_shares(built.module, tokens, built.config.routing.share)
    model = exported(built.module, built.config)
    set_thresholds(model, tokens, built.config.routing.share)
    return Served(name, model.to(device=device, dtype=dtype), built.config)


def exported(network: Network, config: ModelConfig) -> Any:
    """The model that an export of `network` gives, except for its thresholds."""
    from megadyn.hf.configuration_megadyn import MegadynConfig
    from megadyn.hf.modeling_megadyn import MegadynForCausalLM

    model = MegadynForCausalLM(MegadynConfig(**to_hf_config(config, "float32")))
    weights = {name_of(param): param.detach() for param in network.parameters()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith(THRESHOLD) or "causal_router.fc" in name for name in missing)
    return model.eval()


@torch.no_grad()
def widen(network: Network) -> None:
    """Makes layers' updates as large as in a trained model. With initial weights they are so small that scores based on
    them round to the same number for many tokens, which no threshold can separate."""
    for weight in network.parameters():
        if name_of(weight).endswith("down_proj.weight"):
            weight.mul_(WIDER)


@torch.no_grad()
def set_thresholds(model: Any, tokens: Tensor, share: float) -> None:
    """Sets thresholds, first layer to last, so that `share` of the tokens in the second half of each sequence are
    taken. With random weights, scores drift over the first tokens, which have little context; decoding comes after them."""

    def set_before_choosing(rule: Any, inputs: tuple[Tensor, ...]) -> None:
        score = inputs[0][:, inputs[0].shape[1] // 2 :].flatten()
        rule.threshold.fill_(score.topk(capacity_count(share, len(score))).values[-1])

    rules = [module for name, module in model.named_modules() if name.endswith("causal_router")]
    hooks = [
        rule.register_forward_pre_hook(set_before_choosing) for rule in rules if hasattr(rule, "threshold")
    ]
    model(tokens, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()


def reference(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Served:
    """transformers' Qwen2 with random weights and the shape of `config`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config.from_dict(to_dense_config(config, REFERENCE, "float32")))
    return Served(REFERENCE, model.to(device=device, dtype=dtype).eval(), dense_twin(config))


def opened(path: Path, name: str, device: torch.device, dtype: torch.dtype) -> Served:
    """A model from an export folder, run by the code in that folder, under this name."""
    from transformers import AutoModelForCausalLM

    config = read_json(path / "config.json")
    if config.get("model_type") != "megadyn":
        raise UserError(
            f"--export {path}: must be an export of megadyn, but its model_type is {config.get('model_type')!r}"
        )
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, local_files_only=True)
    return Served(name, model.to(device=device, dtype=dtype).eval(), from_hf_config(config))


def names_of(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parts of their paths as tell them apart."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--export: names a folder twice")
    parts = [path.resolve().parts for path in paths]
    count = next(
        count
        for count in range(1, 1 + max(map(len, parts)))
        if len({p[-count:] for p in parts}) == len(parts)
    )
    return ["/".join(part[-count:]).lstrip("/") for part in parts]


def opened_all(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Served]:
    """The exports in `args.export`, with their losses on `args.data`, behind a reference of the first one's shape."""
    found = [
        opened(path, name, device, dtype)
        for path, name in zip(args.export, names_of(args.export), strict=True)
    ]
    for one, path in zip(found, args.export, strict=True):
        if args.data is not None:
            one.loss = evaluate(path, args.data, modes=("causal",), samples=args.samples)["causal"]
    return [reference(found[0].config, device, dtype), *found]


def models_of(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, contexts: Sequence[int]
) -> list[Served]:
    """The models in `args.models`, or those in `args.export` and a reference."""
    torch.manual_seed(0)
    if args.export is not None:
        found = opened_all(args, device, dtype)
    else:
        length = max(contexts)
        tokens = torch.randint(args.vocab, (CALIBRATED[0], min(length, CALIBRATED[1])))
        found = [served(name, args, device, dtype, tokens) for name in args.models]
    if args.compile:
        torch._dynamo.config.recompile_limit = max(
            8, 2 * len(found)
        )  # models share the code that is compiled
        for one in found:
            one.compile(device)
    return found
