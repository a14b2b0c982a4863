"""Thousands of tiny steps of every kind of routing and every causal rule, at a high learning rate: does it last?

    megadyn benchmark soak [--steps 5000] [--cases dtf mod-bce/bf16 ...] [--output runs/soak] [--page benchmarks/soak]

Each case is a run of the main job on this machine's Python standard library, read as bytes: at a constant rate of 2e-3 with
ten times that for routers, in four setups: `fp32` and `bf16` on one process, `tensor2` in bf16 on two tensor ranks, and `muon`,
which is `bf16` with that optimizer and for the default settings of each kind. Where the CPU has no bf16 instructions, bf16
matrices are multiplied in fp32 and the product is rounded. `--cases` takes cases, setups, or parts of names up to a `-` or
`/`; the dense controls always run. A case that is done is not run again, and one that was stopped
goes on; `--again` starts anew.
OUTPUT/soak.json holds the curves; `--page` also writes PAGE.md and PAGE.png (needs matplotlib).
Exit status 1 if a bound is broken: `benchmark/soak_bounds.py` states them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megadyn.arguments import add_json_argument, command_parser, positive
from megadyn.benchmark.soak_bounds import FAIL, OK, SEEN, Curves, Soaked, verdicts
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.errors import UserError
from megadyn.kinds import DENSE, Kind, known_kinds, make_kind, settings_of
from megadyn.paths import user_path
from megadyn.report.run import read_run

LENGTH, BATCH, LAYERS = 32, 8, 4
"""Tokens in a sample, samples in a step, layers of the full models."""
RATE, ROUTER_MULTIPLIER = 2e-3, 10
POINTS = 100
"""Records in a run's curves."""
DS_CONFIGS = {"fp32": '{"zero_optimization": {"stage": 0}}', "bf16": '{"zero_optimization": {"stage": 1}}'}
EOD = 256

CONTROLS = {"dense": DENSE, "dense-half": DENSE}
"""Dense models that all others are held to: of the full depth, and of half of it."""
RULES: dict[str, dict[str, Any]] = {
    f"{kind}-{name}": {"kind": kind, **keys}
    for kind in known_kinds()
    if kind != DENSE
    for name, keys in settings_of(kind).items()
}
"""What is soaked: `model.routing` of every kind with its defaults, its causal rules and its variants."""


class Setup(NamedTuple):
    precision: str
    tensor: int = 1
    """Tensor ranks."""
    optimizer: str = "adamw"


SETUPS = {
    "fp32": Setup("fp32"),
    "bf16": Setup("bf16"),
    "tensor2": Setup("bf16", tensor=2),
    "muon": Setup("bf16", optimizer="muon"),
}


@dataclass(frozen=True)
class Case:
    rule: str
    setup: str

    @property
    def name(self) -> str:
        return f"{self.rule}/{self.setup}"

    @property
    def how(self) -> Setup:
        return SETUPS[self.setup]

    @property
    def routing(self) -> Kind:
        return make_kind(**RULES.get(self.rule, {"kind": DENSE}))

    def overrides(self, folder: Path, steps: int) -> list[str]:
        routing = [f"model.routing.{key}={value}" for key, value in RULES.get(self.rule, {}).items()]
        halved = [f"model.num_layers={LAYERS // 2}"] if self.rule == "dense-half" else []
        return [
            *routing,
            *halved,
            f"precision={self.how.precision}",
            f"parallel.tensor={self.how.tensor}",
            f"optimizer.name={self.how.optimizer}",
            f"training.iterations={steps}",
            f"deepspeed_config={folder.parent.parent / (self.how.precision + '.json')}",
            f"output_dir={folder}",
            f"logging.interval={max(10, steps // POINTS)}",
            f"checkpoint.interval={max(500, steps // 5)}",
        ]


CASES = [
    Case(rule, setup)
    for setup, how in SETUPS.items()
    for rule in (*CONTROLS, *RULES)
    if how.optimizer == "adamw" or rule in CONTROLS or rule.endswith("-default")
]


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these names or parts of names (all without any), and the controls. UserError for a name that is none."""

    def fits(case: Case, name: str) -> bool:
        return case.name == name or case.name.startswith((f"{name}-", f"{name}/")) or case.setup == name

    for name in names:
        if not any(fits(case, name) for case in CASES):
            raise UserError(
                f"--cases {name}: no such case; there are {', '.join((*CONTROLS, *RULES))}, each also with "
                f"/{', /'.join(SETUPS)}"
            )
    wanted = [case for case in CASES if not names or any(fits(case, name) for name in names)]
    needed = {case.setup for case in wanted}
    return [case for case in CASES if case in wanted or (case.rule in CONTROLS and case.setup in needed)]


# ---- what all runs share -------------------------------------------------------------------------

BASE = f"""\
model: {{hidden_size: 32, num_layers: {LAYERS}, num_heads: 4, num_kv_heads: 2, ffn_size: 96, vocab_size: 258}}
tokenizer: {{path: byte}}
data: {{train: DATA/train, validation: DATA/validation}}
training: {{global_batch_size: {BATCH}, micro_batch_size: {BATCH}, sequence_length: {LENGTH}, eval_interval: 0, eval_samples: 64}}
optimizer: {{learning_rate: {RATE}, min_learning_rate: 0.0, schedule: constant, warmup_iterations: 20,
  multipliers: {{router: {ROUTER_MULTIPLIER}, prior: {ROUTER_MULTIPLIER}}}}}
checkpoint: {{keep: 1}}
logging: {{tensorboard: false, live: never}}
output_dir: unused
"""


def prepare(folder: Path) -> Path:
    """Writes the data, the engine settings and the configuration that all cases share; returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data/validation.idx").exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        texts = [text for path in sorted(library.glob("*.py")) if (text := path.read_bytes()).strip()]
        write_bytes(texts[::10], folder / "data/validation")
        write_bytes([text for i, text in enumerate(texts) if i % 10], folder / "data/train")
    for precision, settings in DS_CONFIGS.items():
        (folder / f"{precision}.json").write_text(settings)
    config = folder / "base.yaml"
    config.write_text(BASE.replace("DATA", str(folder / "data")))
    return config


def write_bytes(texts: Sequence[bytes], prefix: Path) -> None:
    """A dataset of these documents as the byte tokenizer would encode them."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in texts:
            ids = np.append(np.frombuffer(text, np.uint8).astype(np.uint16), EOD)
            writer.add(ids, [len(ids)], [1])
        writer.finish()


# ---- one case ------------------------------------------------------------------------------------


def soak(case: Case, base: Path, steps: int) -> Soaked:
    """Runs the case to `steps`, on from where an earlier run of it stopped."""
    folder = base.parent / "cases" / case.name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    ended = problem_of_job([str(base), *case.overrides(folder, steps)], case.how.tensor, folder)
    seconds = time.perf_counter() - began
    curves = curves_of(folder / "metrics.jsonl")
    return Soaked(
        case.name,
        case.rule,
        share_held(case.routing),
        steps,
        curves,
        seconds,
        ended,
        is_exact=case.routing.has_topk,
        follows=case.routing.uses_threshold,
        is_signed=case.routing.has_signed_gate,
        is_chance=case.routing.gate_is_chance,
        in_mean=case.routing.held_in_mean,
    )


def share_held(routing: Kind) -> float | None:
    """Share of tokens that a routed layer is held to; None where nothing holds it."""
    return routing.share if routing.name != DENSE and routing.holds_share else None


def problem_of_job(arguments: list[str], processes: int, folder: Path) -> str:
    """Runs the main job, whose output folder is `folder`; returns why it did not come to its end, or "" if it did."""
    log = folder / "rank0.log"
    if run_job(arguments, processes, log):
        return last_error(log)
    return "" if read_run(folder, str(folder)).is_over else "the run was stopped before its last step"


def run_job(arguments: list[str], processes: int, log: Path) -> int:
    """The main job on this machine. Ranks are forked from a process that has imported what they need; returns the worst exit
    status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    method = multiprocessing.get_context("forkserver")
    ranks = [
        method.Process(
            target=_be_rank, args=(rank, processes, port, arguments, str(log.with_name(f"rank{rank}.log")))
        )
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join()
    finally:
        for process in ranks:
            process.kill()
    return max(abs(process.exitcode or 0) for process in ranks)


def _be_rank(rank: int, processes: int, port: int, arguments: list[str], log: str) -> None:
    import torch

    from megadyn.benchmark.half_on_cpu import widen_products
    from megadyn.pretrain import main_of_a_rank

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for _ in range(2))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    widen_products()
    sys.argv[1:] = arguments
    main_of_a_rank()


def last_error(log: Path) -> str:
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else f"failed; see {log}"


def curves_of(metrics: Path) -> Curves:
    """What a run's metrics show, by iteration, and its last validation losses."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    training = {record["iteration"]: record for record in records if "lm_loss" in record}
    curves = Curves(sorted(training), [], [], {}, {})
    for iteration in curves.iterations:
        record = training[iteration]
        curves.loss.append(record["lm_loss"])
        curves.grad_norm.append(record["grad_norm"])
        for layer, found in record["routing"].items():
            for name, value in found.items():
                curves.layers.setdefault(layer, {}).setdefault(name, []).append(value)
    for record in records:
        curves.validation |= record.get("validation") or {}
    return curves


# ---- the tool ------------------------------------------------------------------------------------


def run_all(cases: Sequence[Case], folder: Path, steps: int, *, again: bool = False) -> dict[str, Soaked]:
    """Every case by its name; OUTPUT/soak.json is renewed after each."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megadyn.pretrain", "megadyn.engine.engine"]
    )
    folder, results = folder.absolute(), folder / "soak.json"
    if again:
        shutil.rmtree(folder / "cases", ignore_errors=True)
        results.unlink(missing_ok=True)
    base = prepare(folder)
    done = {}
    if results.exists():
        done = {name: Soaked.of(found) for name, found in json.loads(results.read_text()).items()}
    for case in cases:
        if case.name in done and done[case.name].steps == steps and not done[case.name].ended:
            continue
        done[case.name] = soak(case, base, steps)
        temporary = results.with_suffix(".tmp")
        temporary.write_text(json.dumps({name: found.record() for name, found in done.items()}))
        temporary.replace(results)
        print(
            f"{case.name}: {done[case.name].seconds:.0f} s {done[case.name].ended}",
            file=sys.stderr,
            flush=True,
        )
    return {case.name: done[case.name] for case in cases}


def table(found: dict[str, Soaked]) -> tuple[str, int]:
    """A line per case and bound that is not kept, a short one for what is; and how many bounds are broken."""
    lines = ["| case | loss | half depth | broken or doubtful |", "|---|---|---|---|"]
    broken = 0
    for name, soaked in found.items():
        control = found.get(f"dense-half/{name.partition('/')[2]}")
        judged = verdicts(soaked, control, LENGTH)
        broken += sum(verdict.level == FAIL for verdict in judged)
        told = "; ".join(
            f"{verdict.level.upper()} {verdict.text}" for verdict in judged if verdict.level not in (OK, SEEN)
        )
        half = f"{control.final_loss:.3f}" if control else "-"
        lines.append(f"| {name} | {soaked.final_loss:.3f} | {half} | {told or 'nothing'} |")
    return "\n".join(lines), broken


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("benchmark soak", __doc__)
    parser.add_argument("--steps", type=positive, default=5000, metavar="N")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of {', '.join((*CONTROLS, *RULES))}, each also with /{', /'.join(SETUPS)}",
    )
    parser.add_argument("--output", type=user_path, default=Path("runs/soak"), metavar="DIR")
    parser.add_argument("--page", type=user_path, metavar="PATH", help="write PATH.md and PATH.png")
    parser.add_argument("--again", action="store_true", help="forget what was run before")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    found: dict[str, Any] = run_all(chosen(args.cases), args.output, args.steps, again=args.again)
    text, broken = table(found)
    print(text)
    if args.page:
        from megadyn.benchmark.soak_page import write_page

        write_page(found, args.page, text, " ".join(("python tools/benchmark.py soak", *argv)))
    if args.json:
        print(json.dumps({name: soaked.record() for name, soaked in found.items()}))
    if broken:
        raise SystemExit(1)
