"""Collects the results of a finished quickstart in summary.json, and prints them.

    python examples/quickstart/summarize.py runs/quickstart EVALUATION.json

EVALUATION.json: the last line of `tools/evaluate.py --json` on the exported model.
"""

import json
import sys
from pathlib import Path


def main(run: Path, evaluation_file: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "lm_loss" in record]
    # Of one set without a name, or of several by name (`data.validation`), the first of which counts below.
    sets: dict[str, list[dict[str, float]]] = {}
    for record in records:
        for name in record:
            if name.partition("/")[0] == "validation":
                sets.setdefault(name, []).append(record[name])
    validation = next(iter(sets.values()))
    warnings = [record["router_warning"]["sentence"] for record in records if "router_warning" in record]
    evaluation = json.loads(evaluation_file.read_text().splitlines()[-1])
    speeds = sorted(record["tokens_per_second"] for record in training)
    summary = {
        "iterations": training[-1]["iteration"],
        "tokens": training[-1]["consumed_tokens"],
        "validation_loss_before": validation[0]["topk"],
        "validation_loss_after": validation[-1]["topk"],
        "topk_loss": evaluation["topk"],
        "causal_loss": evaluation["causal"],
        "routed_fraction": evaluation.get("routed_fraction", 1.0),
        "causal_agreement": evaluation.get("causal_agreement", 1.0),
        "tokens_per_second": speeds[len(speeds) // 2],
        "router_warnings": warnings,
        "folder": str(run),
    }
    if len(sets) > 1 or "validation" not in sets:
        summary["validations"] = {name.partition("/")[2]: found[-1] for name, found in sets.items()}
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"""
trained     {summary["iterations"]} iterations, {summary["tokens"]:,} tokens, {summary["tokens_per_second"]:,.0f} tokens/s
validation  loss {summary["validation_loss_before"]:.3f} before, {summary["validation_loss_after"]:.3f} after
exported    loss {summary["topk_loss"]:.3f} routed by top-k, {summary["causal_loss"]:.3f} causally
routing     {summary["routed_fraction"]:.0%} of tokens processed causally; {summary["causal_agreement"]:.0%} of choices as top-k's
in {run}/
    tokenizer/   data/   checkpoints/   metrics.jsonl   tensorboard/   summary.json
    hf/          the model for transformers: AutoModelForCausalLM.from_pretrained("{run}/hf", trust_remote_code=True)
docs/getting-started.md, "A first hour", continues from here: a report on the run, a second run, and a comparison""")
    for sentence in warnings:
        print(f"warned in training: {sentence}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
