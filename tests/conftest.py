"""No test reaches the network, or leaves modules in the user's home; without a GPU Triton's kernels run in its interpreter."""

import os
import tempfile

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="megadyn-tests-")}    # read on import
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"             # read when Triton is imported
