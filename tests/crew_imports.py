"""Imported once by the process that all ranks of the tests are forked from."""

import gc
import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

# Four modules that DeepSpeed imports late, at the first step: seconds in each rank.
import deepspeed.module_inject.auto_ep_layer  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.tensor
import torch.onnx

import megadyn.pretrain  # noqa: F401
from megadyn.training import engine, pipeline  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()               # what is imported is no garbage: a rank need not look through it again and again
