"""The phases of a run as a table, and which of them decides whether a layout fits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megadyn.config import Config
from megadyn.planning.flops import layer_costs, training_flops
from megadyn.planning.layouts import Layout, Refusal

HEADER = "phase        iterations        tokens     steps of       learning rate  operations"


class PhasePlan(NamedTuple):
    name: str
    begin: int
    end: int
    tokens: int
    batch: int
    """Samples per step."""
    length: int
    """Tokens per sample."""
    first_rate: float
    last_rate: float
    flops: float
    """Operations of the whole phase."""

    def line(self) -> str:
        """80 columns, if the name is short."""
        rates = f"{self.first_rate:.2g} -> {self.last_rate:.2g}"
        steps = f"{self.batch:,} x {self.length:,}"
        return (
            f"{self.name:<9} {f'{self.begin + 1:,}-{self.end:,}':>13} {self.tokens:>13,} {steps:>12} {rates:>19} "
            f"{self.flops:>11.3g}"
        )


def phase_plans(configs: Sequence[Config], rate: Callable[[Config, int], float]) -> list[PhasePlan]:
    """`rate`: the learning rate of a 0-based step of a configuration."""
    plans = []
    for config in configs:
        phase, length = config.phase, config.training.sequence_length
        assert phase is not None
        samples = phase.samples_at_end - phase.samples
        plans.append(
            PhasePlan(
                phase.name,
                phase.begin,
                phase.end,
                samples * length,
                phase.batch,
                length,
                rate(config, phase.begin),
                rate(config, phase.end - 1),
                samples * training_flops(config.model, length),
            )
        )
    return plans


def phase_table(plans: Sequence[PhasePlan]) -> str:
    """One line per phase, and their totals."""
    tokens, flops = sum(plan.tokens for plan in plans), sum(plan.flops for plan in plans)
    total = f"{'all':<9} {f'1-{plans[-1].end:,}':>13} {tokens:>13,} {'':>32} {flops:>11.3g}"
    return "\n".join([HEADER, *(plan.line() for plan in plans), total])


def largest(configs: Sequence[Config]) -> Config:
    """The configuration whose samples take most operations in the layers, and so most memory."""
    return max(configs, key=lambda config: sum(layer_costs(config.model, config.training.sequence_length)))


def refusal(layout: Layout, configs: Sequence[Config]) -> Refusal | None:
    """Why a layout of one phase is not possible in another one; None if it is."""
    for config in configs:
        batch = config.training.global_batch_size
        if config.phase and batch % layout.data:
            why = f"training.global_batch_size = {batch}: must be a multiple of the {layout.data} data-parallel ranks"
            return Refusal(
                layout.tensor, layout.pipeline, layout.zero_stage, f"phase {config.phase.name!r}: {why}"
            )
    return None
