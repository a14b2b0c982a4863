"""Imported once by the process that a crew's ranks are forked from."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

import torch
import torch._dynamo  # torch's optimizers load it in their first step

import megadyn.pretrain  # noqa: F401

torch.set_num_threads(1)
