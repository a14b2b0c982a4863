"""README.md of an exported folder: what the model is, how it was trained, its losses, and how to load it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadyn.config import Config, ModelConfig
from megadyn.config.dense_map import TITLES
from megadyn.data.indexed import files_of
from megadyn.data.record import read_record
from megadyn.errors import UserError
from megadyn.hub import address_in
from megadyn.kinds import DENSE
from megadyn.log import log
from megadyn.planning.flops import dense_twin, training_flops
from megadyn.planning.parameters import total_parameters

GENERATE = """ids = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=16)[0]))
"""


def model_card(
    config: Config,
    iteration: int,
    consumed_samples: int,
    history: dict[str, Any],
    *,
    style: str,
    precision: str,
    tokenizer: str,
    averaged: Sequence[int] = (),
    consumed_tokens: int | None = None,
    phases: Sequence[str] = (),
) -> str:
    """The whole text, including front matter for the Hugging Face hub.

    Args:
        history: from `last_records`.
        consumed_tokens: if sequences had several lengths; None: they all had the last one.
        phases: names of the phases of the run up to this one.
        averaged: the steps of the checkpoints whose average the weights are, if they are one.
        style: `megadyn` or one of DENSE_TYPES; precision: of the weights; tokenizer: a sentence on it.
    """
    model, length = config.model, config.training.sequence_length
    routing = model.routing
    is_dense = routing.name == DENSE
    given = config.checkpoint.init_from
    # Of a path only its last part: the rest is specific to the machine.
    origin = given and (given if address_in(given) else Path(given).name)
    start = f", starting from the weights of {origin}" if origin else ""
    # False if the batch size changed during the run.
    is_uniform = iteration * config.training.global_batch_size == consumed_samples
    batch = f" of {config.training.global_batch_size}" if is_uniform else ","
    tokens = consumed_samples * length if consumed_tokens is None else consumed_tokens
    sequences = f"sequences of {length}" + (" at the end" if tokens != consumed_samples * length else "")
    tags = ["megadyn", *routing.tags, *(["custom_code"] if style == "megadyn" else [])]
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "# license: add the license under which you publish these weights",
        "---",
    ]
    parts = [
        "\n".join(front),
        f"# A {routing.title} of {total_parameters(model):,} parameters",
        f"Pretrained with megadyn on {tokens:,} tokens ({iteration:,} steps{batch} {sequences})"
        f"{start}.{_average(averaged)} A base model: it continues text and does not follow "
        "instructions.",
        "## Architecture\n\n" + _table(_architecture(model, precision, tokenizer)),
        *([] if is_dense else ["## Routing\n\n" + routing.explain(_means_over_layers(history))]),
        "## Work per token\n\n" + _work(model, length, history),
        "## Data\n\n" + _data(config) + _earlier_data(phases),
        "## Losses\n\n" + (OF_RUN if averaged else "") + _losses(history, has_topk=routing.has_topk),
        "## Use\n\n" + _use(style),
    ]
    return "\n\n".join(parts) + "\n"


EVALUATED = ("lm_loss", "validation", "test")
"""Keys that tell records of metrics.jsonl apart; sets with a name have `validation/NAME`."""
OF_RUN = "Of the run's own weights at these steps, not of their average.\n\n"


def _average(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    low, high = min(steps), max(steps)
    at = f"of step {low:,}" if low == high else f"of steps {low:,} to {high:,}"
    return f" The weights are the average of {len(steps)} checkpoints {at}."


def last_records(metrics: Path, iteration: int) -> dict[str, Any]:
    """The last training record and those of each evaluated set in a run's metrics.jsonl up to `iteration`, by what
    distinguishes them in it."""
    found: dict[str, Any] = {}
    try:
        lines = metrics.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read ({error})") from None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a partial line: the run may be writing it right now
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            continue
        if record["iteration"] <= iteration:
            found |= {key: record for key in record if key in EVALUATED or key.startswith("validation/")}
    return found


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {escaped(value)} |" for name, value in rows.items())]
    )


def escaped(value: object) -> str:
    """A table cell, without the `|` and line breaks that would end it."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _architecture(model: ModelConfig, precision: str, tokenizer: str) -> dict[str, Any]:
    norms = {
        "pre": "before attention and feed-forward",
        "lns": "before attention and feed-forward, divided by the square root of the layer's number",
        "hybridnorm": "on queries, keys and values, and after attention",
    }
    return {
        "layers": f"{model.num_layers}: "
        + ", ".join(f"{model.layer_types.count(kind)} `{kind}`" for kind in dict.fromkeys(model.layer_types)),
        "hidden size, feed-forward": f"{model.hidden_size}, {model.ffn_size} (SwiGLU)",
        "heads": f"{model.num_heads} of size {model.head_dim}, {model.num_kv_heads} for keys and values",
        "positions": _positions(model),
        "norms": f"RMSNorm {norms[model.normalization]}{', and on queries and keys' if model.qk_norm else ''}",
        "vocabulary": f"{model.vocab_size:,}{', input and output embeddings tied' if model.tie_embeddings else ''}",
        "weights": precision,
        "tokenizer": tokenizer,
    }


def _positions(model: ModelConfig) -> str:
    rope = model.rope
    stretched = "" if rope.type == "default" else f", `{rope.type}` by {rope.factor:g}"
    skipped = f", none in layers {', '.join(map(str, rope.skip_layers))}" if rope.skip_layers else ""
    return f"rotary, base {rope.theta:g}{stretched}{skipped}; up to {model.max_position}"


def _means_over_layers(history: dict[str, Any]) -> dict[str, float]:
    """Each statistic in the last training report, averaged over the layers that have it."""
    layers = history.get("lm_loss", {}).get("routing", {}).values()
    found: dict[str, list[float]] = {}
    for layer in layers:
        for name, value in layer.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _work(model: ModelConfig, length: int, history: dict[str, Any]) -> str:
    """Operations per token of a training step, with routing and without."""
    routing = model.routing
    plain = training_flops(dense_twin(model), length) / length
    if routing.name == DENSE:
        return f"{plain:.3g} floating-point operations per token of a training step, forward and backward, at length {length}."
    share, shares = f"the configured {routing.share:.1%} of tokens", None
    if routing.varies:
        measured = _means_over_layers(history).get("routed_fraction")
        if measured is None:
            return (
                f"It depends on the tokens' choices; without routing it is {plain:.3g} operations per token."
            )
        shares = dict.fromkeys(range(model.num_layers), measured)
        share = f"the measured share of {measured:.1%} of tokens ({routing.verb})"
    routed = training_flops(model, length, shares) / length
    return (
        f"{routed:.3g} floating-point operations per token of a training step, forward and backward, at length {length} and "
        f"{share}: {routed / plain:.1%} of the {plain:.3g} of the same model without routing."
    )


def _earlier_data(phases: Sequence[str]) -> str:
    if len(phases) < 2:
        return ""
    return (
        f"\n\nThese are the data of the phase `{phases[-1]}`. Before it the run had {len(phases) - 1}: "
        f"{', '.join(f'`{name}`' for name in phases[:-1])}."
    )


def _data(config: Config) -> str:
    rows = ["| dataset | share | documents | tokens, including held-out ones |", "|---|---|---|---|"]
    for source in config.data.sources("train"):
        prefix = Path(source.prefix)  # only its last part: the rest is specific to the machine
        share = "" if source.share is None else f"{source.share:g}"
        try:
            record = read_record(files_of(prefix)["json"])
        except UserError as error:
            log.warning("the model card says nothing about dataset %s: %s", prefix, error)
            record = None
        size = f"{record.documents:,} | {record.tokens:,}" if record else "? | ?"
        rows.append(f"| {escaped(prefix.name)} | {share} | {size} |")
    return "\n".join(rows)


def _losses(history: dict[str, Any], has_topk: bool) -> str:
    """Without top-k there is only one routing mode, so one row per set."""
    if not history:
        return "Unknown: there was no metrics.jsonl next to the checkpoint with a record of this step or an earlier one."
    rows = ["| set | routing | loss, nats per token | step |", "|---|---|---|---|"]
    if record := history.get("lm_loss"):
        rows.append(
            f"| training | {'topk' if has_topk else ''} | {_loss(record['lm_loss'])} | {record['iteration']:,} |"
        )
    for name, record in sorted(history.items(), key=lambda item: (item[0] == "test", item[0])):
        if name == "lm_loss":
            continue
        for mode in ("topk", "causal") if has_topk else ("causal",):
            if mode in record[name]:
                rows.append(
                    f"| {name} | {mode if has_topk else ''} | {_shown(record[name], mode)} | {record['iteration']:,} |"
                )
    return "\n".join(rows)


def _shown(losses: dict[str, Any], mode: str) -> str:
    """A set's loss, and what it is in bits per byte if that is known."""
    bits = losses.get("bits_per_byte", {}).get(mode)
    return _loss(losses[mode]) + ("" if bits is None else f" ({bits:.4f} bits per byte)")


def _loss(value: float | None) -> str:
    """metrics.jsonl has null for NaN and infinity."""
    return "not finite" if value is None else f"{value:.4f}"


def _use(style: str) -> str:
    if style in TITLES:
        return (
            f"A plain {TITLES[style]}: any tool that knows {TITLES[style]} loads it, without `trust_remote_code`.\n\n```python\n"
            "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n\n"
            'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")\n'
            "tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)\n" + GENERATE + "```"
        )
    return (
        "`modeling_megadyn.py` in this folder runs the model; read it before you trust it.\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)\n" + GENERATE + "```\n\n"
        "    lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks arc_easy\n\n"
        'LoRA: `LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")`, or `target_modules=r".*(self_attn|mlp)'
        '\\..*_proj"` to adapt the blocks but not the routers and priors.'
    )
