"""Fused Triton kernels for GPUs, and the rule that decides whether they run. Next to each use is the same computation
in torch."""
