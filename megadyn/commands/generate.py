"""Continue a prompt with an exported model.

    megadyn generate --model runs/quickstart/hf --prompt "def " --max-new-tokens 64

Prints the prompt and its continuation. With --json the last line is one object: `prompt`, `completion`,
`prompt_tokens`,
`new_tokens`, `routing`, `seconds`, `cached_tokens` (tokens in each layer's cache at the end; null with top-k, which
cannot use a cache). This runs the folder's own model code, so use only folders that you trust.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadyn.arguments import command_parser, seed
from megadyn.errors import Parser, UserError
from megadyn.log import log
from megadyn.paths import user_path


def make_parser() -> Parser:
    parser = command_parser("generate", __doc__)
    parser.add_argument(
        "--model", type=user_path, required=True, metavar="HF_DIR", help="exported Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most likely tokens with this total probability",
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--routing", choices=("causal", "topk"), default="causal")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    # Python represents invalid bytes in arguments as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise UserError("--prompt is not valid UTF-8")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be in (0, 1]")
    return args


def load(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) from a local folder, without network access; every weight must be present."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: {'no config.json there' if folder.is_dir() else 'no such folder'}"
        )
    log.info("loading transformers")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    log.info("loading %s", folder)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=True, dtype="auto", output_loading_info=True
        )
        # Use tokenizer.json directly: for a Qwen2 folder AutoTokenizer would replace its rules by Qwen2's own.
        kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    # transformers may raise any exception for a file with unexpected content.
    except Exception as error:
        raise UserError(
            f"--model {folder}: cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if names := sorted(info[problem]):
            raise UserError(
                f"--model {folder}: {len(names)} {problem.replace('_', ' ')} in its weights, e.g. {names[0]}"
            )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def generate(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    rope = model.config.rope_parameters
    # of `dynamic` the configuration has the length before the context was stretched
    stretch = rope["factor"] if rope["rope_type"] == "dynamic" else 1
    longest = int(model.config.max_position_embeddings * stretch)
    if prompt_tokens == 0:
        raise UserError("--prompt is empty")
    if prompt_tokens + args.max_new_tokens > longest:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens}: with the prompt's {prompt_tokens} tokens that is more than "
            f"the model's maximum of {longest}"
        )
    model.config.routing_mode = args.routing
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        if args.temperature
        else {"do_sample": False}
    )
    log.info("generating %d tokens on %s", args.max_new_tokens, model.device)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        use_cache=args.routing == "causal",
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    ids = output.sequences[0]
    before, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:prompt_tokens], ids))
    cache = output.past_key_values
    return {
        "prompt": args.prompt,
        # Not decoded from the new tokens only, because a tokenizer may drop their first space.
        "completion": text.removeprefix(before),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(ids) - prompt_tokens,
        "routing": args.routing,
        "seconds": round(seconds, 3),
        "cached_tokens": None if cache is None else [counts[0] for counts in cache.tokens_per_layer()],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    result = generate(*load(args.model), args)
    print(result["prompt"] + result["completion"])
    print(
        f"\n{result['new_tokens']} tokens in {result['seconds']:.1f} s "
        f"({result['new_tokens'] / max(result['seconds'], 1e-3):.1f} tokens/s)"
    )
    if args.json:
        print(json.dumps(result))
    return 0
