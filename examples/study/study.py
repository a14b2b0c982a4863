"""Dense, shallower dense, MoD, DTF and DTRNet models of the same width on the same text, several seeds; one table and a plot.

    python examples/study/study.py --output runs/study [--seeds 3] [--jobs 2] [key=value ...]

Runs `megadyn.pretrain` once per model and seed, on one thread each, `--jobs` at a time. Then times all models in turns,
one at a time. Finished runs are kept, so you can stop it and start it again. `key=value` overrides apply to every run,
for example training.iterations=2000. Needs the tokenizer and datasets of `make quickstart`.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megadyn.arguments import positive
from megadyn.benchmark.experiments import (
    end_runs_on_signals,
    markdown,
    mean_and_spread,
    pyplot,
    records_of,
    shares_of,
    train,
)
from megadyn.config import Config, load_config
from megadyn.errors import Parser, UserError, run_tool
from megadyn.paths import user_path
from megadyn.planning.flops import training_flops

HERE = Path(__file__).parent
TIMED_ROUNDS, TIMED_STEPS = 3, 12

MODELS: dict[str, list[str]] = {
    "dense, 8 layers": [],
    "dense, 7 layers": ["model.num_layers=7"],
    "dense, 6 layers": ["model.num_layers=6"],
    "dense, 5 layers": ["model.num_layers=5"],
    "dense, 4 layers": ["model.num_layers=4"],
    "MoD 12.5 %": [
        "model.routing.kind=mod",
        "model.routing.capacity=0.125",
        "model.routing.threshold_momentum=0.9",
    ],
    "DTF 50 %": [
        "model.routing.kind=dtf",
        "model.routing.capacity=0.5",
        "model.routing.threshold_momentum=0.9",
    ],
    "DTRNet bilayer": [
        "model.routing.kind=dtrnet",
        "model.routing.layout=bilayer",
        "model.routing.aux_loss_lambda=0.01",
    ],
}
"""Eight layers of one width, routed or not, and dense models of about the routed models' FLOPs: the control that every
claim needs."""


def command(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> list[str]:
    return [
        str(HERE / "config.yaml"),
        *MODELS[name],
        f"training.seed={seed}",
        f"output_dir={folder}",
        *overrides,
    ]


def finished(folder: Path, iterations: int) -> bool:
    try:
        _, last = records_of(folder)
    except UserError:
        return False
    return bool(last["iteration"] == iterations)


def time_steps(
    folders: dict[str, Path], iterations: int, scratch: Path, overrides: Sequence[str]
) -> dict[str, float]:
    """Seconds per training step, by model: each run in `folders` trains a little further, one process at a time.

    The models take turns, so that other load on the machine slows all of them alike; the fastest round of each model counts.
    """
    found: dict[str, list[float]] = {name: [] for name in folders}
    for turn in range(TIMED_ROUNDS):
        for name, folder in folders.items():
            run = scratch / f"{turn}-{folder.parent.name}"
            further = [
                *overrides,
                f"checkpoint.resume={folder}",
                f"training.iterations={iterations + TIMED_STEPS}",
                "logging.interval=1",
            ]
            train(command(name, 1, run, further))
            steps, _ = records_of(run)
            found[name].append(statistics.median(step["step_time_ms"] for step in steps[2:]) / 1e3)
    return {name: min(medians) for name, medians in found.items()}


def measure(config: Config, folder: Path, seconds: float) -> dict[str, float]:
    """Results of one finished run; `seconds` per step."""
    steps, last = records_of(folder)
    layers = steps[-1]["routing"].values()
    taken = shares_of(steps[-1]).values()
    fraction = statistics.mean(taken) if taken else 1.0
    # Used only for kinds whose tokens choose for themselves.
    shares = dict.fromkeys(range(config.model.num_layers), fraction)
    found = {
        "flops": training_flops(config.model, config.training.sequence_length, shares)
        * config.training.global_batch_size,
        "seconds": seconds,
        "routed": fraction,
        "topk": last["validation"]["topk"],
        "causal": last["validation"]["causal"],
    }
    agreements = [layer["causal_agreement"] for layer in layers if "causal_agreement" in layer]
    return found | ({"agreement": statistics.mean(agreements)} if agreements else {})


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table; FLOPs and time are per training step, relative to the first model."""
    first = next(iter(results.values()))
    base = {key: statistics.mean(run[key] for run in first) for key in ("flops", "seconds")}
    lines = []
    for name, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        lines.append(
            [
                name,
                *(mean_and_spread([run[key] for run in runs], 4) for key in ("topk", "causal")),
                *(f"{mean[key] / base[key]:.3f}" for key in ("flops", "seconds")),
                f"{mean['routed']:.1%}",
                f"{mean['agreement']:.1%}" if "agreement" in mean else "-",
            ]
        )
    return markdown(["model", "loss, top-k", "loss, causal", "FLOPs", "time", "routed", "agreement"], lines)


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Validation loss against training FLOPs and against time; one point per run."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, key, label in (
        (axes[0], "flops", "FLOPs per training step"),
        (axes[1], "seconds", "seconds per training step"),
    ):
        for name, runs in results.items():
            marker = "o" if name.startswith("dense") else "^"
            axis.scatter(
                [run[key] for run in runs], [run["causal"] for run in runs], label=name, marker=marker
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, causal routing")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=user_path, required=True)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--jobs", type=positive, default=os.cpu_count())
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end_runs_on_signals()
    folders = {
        (name, seed): args.output / name.replace(" ", "-").replace(",", "").replace("%", "pc") / f"seed{seed}"
        for name in MODELS
        for seed in range(1, args.seeds + 1)
    }
    configs: dict[Any, Config] = {}
    for (name, seed), folder in folders.items():
        path, *words = command(name, seed, folder, args.overrides)
        config = configs[name, seed] = load_config(path, words)
        config.model.vocab_size = json.loads(Path(f"{config.data.train}.json").read_text())["vocab_size"]
    iterations = config.training.iterations or 0
    open_runs = [key for key, folder in folders.items() if not finished(folder, iterations)]
    timing = args.output / "timing.json"
    if open_runs:
        timing.unlink(missing_ok=True)

    def one(name: str, seed: int) -> None:
        train(command(name, seed, folders[name, seed], args.overrides))
        records_of(folders[name, seed])
        print(f"trained {name}, seed {seed}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one, *key) for key in open_runs]
        try:
            for job in jobs:
                job.result()
        except UserError:
            pool.shutdown(wait=False, cancel_futures=True)  # what is at work is finished
            raise
    if not timing.exists():
        with tempfile.TemporaryDirectory(dir=args.output) as scratch:
            first_seeds = {name: folders[name, 1] for name in MODELS}
            timing.write_text(json.dumps(time_steps(first_seeds, iterations, Path(scratch), args.overrides)))
    seconds = json.loads(timing.read_text())
    results = {
        name: [
            measure(configs[name, seed], folders[name, seed], seconds[name])
            for seed in range(1, args.seeds + 1)
        ]
        for name in MODELS
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "table.md").write_text(table(results))
    plot(results, args.output / "plot.png")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
