"""Formats a run's reports as text."""

from typing import Any

from megadyn.progress import duration


def train_line(record: dict[str, Any], iterations: int, seconds_left: float) -> str:
    """One line of at most 100 columns. MFU counts causal attention at half."""
    parts = [progress(record["iteration"], iterations), f"loss {record['lm_loss']:.4f}"]
    parts += [f"{name} {value:.2g}" for name, value in record["aux_losses"].items()]
    norm = record["grad_norm"]
    parts.append(f"grad {norm:.2f}" if norm < 10 else f"grad {norm:.3g}")
    if (routed := routed_share(record)) is not None:
        parts.append(f"routed {routed:.0%}")
    mfu = record.get("mfu_causal_half")
    parts += [
        f"{short(record['tokens_per_second'])} tok/s",
        f"{record['model_tflops']:.3g} TFLOP/s" if mfu is None else f"MFU {mfu:.1%}",
        f"left {duration(seconds_left)}",
    ]
    return "  ".join(parts)


def routed_share(record: dict[str, Any]) -> float | None:
    """Mean over the layers that route; None if there are none."""
    routed = [layer["routed_fraction"] for layer in record["routing"].values() if "routed_fraction" in layer]
    return sum(routed) / len(routed) if routed else None


def evaluation_line(
    iteration: int,
    iterations: int,
    name: str,
    losses: dict[str, float],
    bits: dict[str, float] | None = None,
) -> str:
    """Losses in nats per token, and in bits per byte if given."""
    shown = [f"{mode} {loss:.4f}" for mode, loss in losses.items()]
    shown += [f"bits per byte {' '.join(f'{value:.4f}' for value in bits.values())}"] if bits else []
    return f"{progress(iteration, iterations)}  {name} loss  {'  '.join(shown)}"


def tasks_line(iteration: int, iterations: int, scores: dict[str, dict[str, float]]) -> str:
    """The scores of each task, without their standard errors."""
    shown = [
        " ".join([name, *(f"{metric} {score(found[metric])}" for metric in found if "_stderr" not in metric)])
        for name, found in scores.items()
    ]
    return f"{progress(iteration, iterations)}  tasks  {'  '.join(shown)}"


def score(value: float) -> str:
    """Perplexities of a model that has just begun have many digits."""
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.3g}"


def progress(iteration: int, iterations: int) -> str:
    """`  120/50000`, equally wide in every line of a run."""
    return f"{iteration:>{len(str(iterations))}d}/{iterations}"


def short(count: float) -> str:
    """`3,457`, `45.7k`, `1.23M`: at least three digits."""
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.3g}k" if count < 999_500 else f"{count / 1e6:.3g}M"
