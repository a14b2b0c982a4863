"""No routing: every layer processes every token."""

from dataclasses import dataclass

from megadyn.kinds.kind import DENSE, Kind


@dataclass
class Dense(Kind):
    kind: str = DENSE

    name = DENSE
    title = "dense transformer"
    sentence = "Every token goes through every layer."
    layers = {DENSE: "DenseLayer"}

    def layer_types(self, num_layers: int) -> list[str]:
        return [DENSE] * num_layers


KIND = Dense
