"""What a run loads before its first step: seconds of imports that are not needed must not come back."""

import multiprocessing
import sys
from importlib import import_module

import torch

UNNEEDED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.onnx",
    "sympy",
    "setuptools",
    "transformers",
    "tensorboard",
    "tokenizers",
    "sentencepiece",
    "pyarrow",
    "matplotlib",
)
"""torch's compiler; what DeepSpeed looks for compilers with; what conversion, curves and data preparation need."""


def first_step(output: str) -> None:
    """Writes the names of all modules that are loaded after a training step."""
    import_module("megadyn.pretrain")
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import Grid
    from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

    config = tiny_config("dtf")
    launch.join()
    engine = Engine(config, batch_plan(config, 1), Grid())
    engine.train_step(micro_batches(tiny_tokens(1)[0], 1), 1e-3)
    with open(output, "w") as file:
        file.write("\n".join(sys.modules))


def test_a_first_step_loads_no_compiler_and_no_tools(tmp_path):
    # a new process: the one that others are forked from has loaded more
    process = multiprocessing.get_context("spawn").Process(
        target=first_step, args=(str(tmp_path / "modules"),)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    loaded = set((tmp_path / "modules").read_text().split("\n"))
    assert {"deepspeed", "torch", "megadyn.network"} <= loaded
    assert not [name for name in UNNEEDED if name in loaded]


def test_torch_compile_is_passed_over_in_every_form_and_then_back():
    from megadyn.engine.engine import without_compiler

    def double(x: int) -> int:
        return 2 * x

    compiles = torch.compile
    with without_compiler():
        assert (
            torch.compile(double)
            is torch.compile(double, dynamic=True)
            is torch.compile(mode="default")(double)
            is double
        )
    assert torch.compile is compiles
