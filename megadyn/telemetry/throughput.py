"""Speed of a run in several measures, each defined once."""

from typing import Any

from megadyn.config import Config
from megadyn.planning.devices import peak_tflops
from megadyn.planning.flops import dense_twin, training_flops


class Throughput:
    """Computes rates from the time of a step.

    `tokens_per_second` (all devices) and `tokens_per_second_per_gpu` (one device, or one process on a CPU) count every
    token of the batch, even if a layer skips it. They are dense-equivalent: compare them with those of a dense run.
    `model_tflops`: useful TFLOP/s of one device for tokens that a layer did process; causal attention counts at half of
    its square, and recomputation does not count. `dense_equivalent_tflops`: what the dense twin (the same model without
    routing) would need to be as fast.
    `mfu_causal_half` is `model_tflops` divided by the device's peak; `mfu_whole_square` counts attention's whole
    square, as many systems do. Both are None if the peak is unknown.
    """

    def __init__(self, config: Config, world_size: int, device_name: str | None):
        """`device_name`: of the GPU; None on a CPU."""
        self.model, self.world_size = config.model, world_size
        self.length, self.samples = config.training.sequence_length, config.training.global_batch_size
        self.peak = config.logging.peak_tflops
        if self.peak is None and device_name is not None:
            self.peak = peak_tflops(device_name, config.precision)
        self.dense_flops = training_flops(dense_twin(self.model), self.length)

    def rates(self, step_s: float, routing: dict[int, dict[str, float]]) -> dict[str, Any]:
        """Rates for a step of `step_s` seconds; `routing` gives the share of attending tokens in kinds where tokens choose."""
        shares = {
            layer: found["routed_fraction"] for layer, found in routing.items() if "routed_fraction" in found
        }
        flops, square = (
            training_flops(self.model, self.length, shares, whole_square=whole) for whole in (False, True)
        )
        per_device = self.samples / step_s / self.world_size  # samples per second
        tokens = self.samples * self.length / step_s
        return {
            "tokens_per_second": tokens,
            "tokens_per_second_per_gpu": tokens / self.world_size,
            "model_tflops": flops * per_device / 1e12,
            "dense_equivalent_tflops": self.dense_flops * per_device / 1e12,
            "mfu_causal_half": flops * per_device / 1e12 / self.peak if self.peak else None,
            "mfu_whole_square": square * per_device / 1e12 / self.peak if self.peak else None,
        }
