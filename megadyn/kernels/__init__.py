"""Fused Triton kernels for GPUs, and the rule that says whether they run. What they compute stands in torch beside each use."""
