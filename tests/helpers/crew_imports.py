"""Imported once by the process that all ranks of the tests are forked from."""

import gc
import os
from importlib import import_module

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}  # read on import

import torch
from deepspeed.accelerator import get_accelerator

MODULES = (
    # DeepSpeed imports these late, at the first step: seconds in each rank.
    "deepspeed.module_inject.auto_ep_layer",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.onnx",
    "megadyn.pretrain",
    "megadyn.engine.engine",
    "megadyn.engine.pipeline",
)
for name in MODULES:
    import_module(name)

# DeepSpeed refuses fp16 on a CPU without instructions for it, where torch computes it all the same, only slower.
get_accelerator().is_fp16_supported = lambda: True

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is imported is no garbage: a rank need not look through it again and again
