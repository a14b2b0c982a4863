"""Peak performance of devices from their data sheets; the only such table."""

import re

PEAK_TFLOPS = (
    (r"H100 PCIe", 756.0),
    (r"H[12]00 NVL", 835.0),
    (r"(H100|H200|H800|GH200)", 989.5),
    (r"(A100|A800)", 312.0),
    (r"B200", 2250.0),
    (r"GB200", 2500.0),
    (r"L40S", 362.0),
    (r"A10", 125.0),
    (r"A30", 165.0),
    (r"L4", 121.0),
    (r"V100", 125.0),
    (r"MI300X", 1307.4),
    (r"MI250X?", 383.0),
)
"""Dense TFLOP/s of matrix products in bf16 (V100: fp16), by a word in the device's name; the first match counts."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak for a device name from torch. None for unknown devices, and in fp32, whose peak depends on settings."""
    if precision == "fp32":
        return None
    return next((peak for word, peak in PEAK_TFLOPS if re.search(rf"\b{word}\b", device_name)), None)
