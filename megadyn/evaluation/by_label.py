"""Loss, accuracy and choice of tokens of a saved model, by what each token of a labelled dataset is (`data/labels.py`).

Everything is counted at the position that predicts a token, under the label of the token that it predicts: an answer is
worked out where the question ends. So a position *needs depth* if what it predicts takes at least one lookup. The model is
run by the modelling code that exports ship, which reports the choice and the score of every kind of routing alike.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megadyn.config.config_map import document_fields, to_hf_config
from megadyn.data.batches import read_batch
from megadyn.data.indexed import IndexedDataset
from megadyn.data.labels import Labels, read_labels
from megadyn.data.samples import SampleSet
from megadyn.evaluation.losses import check_dataset
from megadyn.evaluation.saved import Saved, open_saved
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.log import log
from megadyn.network import choosing_layers
from megadyn.progress import each

# Dims: P positions (samples x tokens), R layers that choose tokens.


class Passed(NamedTuple):
    """What a model did at P positions."""

    tokens: NDArray[np.int64]
    """[P], the inputs."""
    classes: NDArray[np.uint8]
    """[P], of the token that follows."""
    hops: NDArray[np.uint8]
    """[P], of the token that follows."""
    loss: NDArray[np.float32]
    """[P], in nats."""
    within: NDArray[np.float32]
    """[P], in nats, of the following token among those of its class."""
    right: NDArray[np.bool_]
    """[P], whether the following token is the likeliest of its class."""
    chosen: dict[int, NDArray[np.bool_]]
    """By layer that chooses tokens: [P], whether it processed the token."""
    score: dict[int, NDArray[np.float32]]
    """By layer that scores tokens: [P], the higher the sooner chosen."""


class Measured(NamedTuple):
    """What was found, and the positions that it was found from."""

    result: dict[str, Any]
    """`loss`, `tokens`, `groups` (see `by_group`) and `layers` (see `by_layer`); can be written as JSON."""
    passed: Passed
    names: tuple[str, ...]
    """Names of the classes."""
    length: int
    """Tokens of a sample; P is a multiple."""


def measure(
    path: Path, data: Path, *, mode: str = "causal", samples: int | None = None, batch_size: int = 64
) -> Measured:
    """Runs a checkpoint, a run's newest checkpoint, or an export over a labelled dataset, in file order.

    Args:
        mode: `causal` or `topk`. samples: only this many, from the start.

    Raises UserError for damaged files, and for labels or tokens that belong to others.
    """
    saved = open_saved(path)
    dataset = IndexedDataset(data)
    labels = read_labels(dataset)
    check_dataset(dataset, saved)
    length = saved.sequence_length
    chosen = SampleSet(dataset, sequence_length=length, seed=0, shuffle=False)
    count = min(len(chosen), samples or len(chosen))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = exported(saved, mode).to(device)
    layers = sorted(choosing_layers(saved.model))
    log.info("measuring %s over %s samples of %s tokens, %s routing", path, f"{count:,}", length, mode)
    candidates = of_class(dataset, labels, model.config.vocab_size)
    parts = _run(model, chosen, count, batch_size, layers, labels, candidates)
    passed = _joined(list(parts), labels, layers)
    result = {
        "loss": float(passed.loss.mean()),
        "tokens": len(passed.loss),
        "groups": by_group(passed, labels.names),
        "layers": by_layer(passed),
    }
    return Measured(result, passed, labels.names, length)


def exported(saved: Saved, mode: str) -> MegadynForCausalLM:
    """The saved model as its export would be, in float32."""
    fields = to_hf_config(saved.model, "float32") | document_fields(saved.eod)
    model = MegadynForCausalLM(MegadynConfig(**fields)).float().eval()
    weights = {name: saved.weights.whole(name).float() for name in saved.weights.names()}
    for layer, threshold in saved.thresholds.items():
        weights[f"model.layers.{layer}.causal_router.threshold"] = threshold.value.reshape(1).float()
    model.load_state_dict(weights)
    model.config.routing_mode = mode
    return model


def of_class(dataset: IndexedDataset, labels: Labels, vocab_size: int) -> torch.Tensor:
    """[classes, vocabulary], bool: whether the token occurs with this class."""
    found = torch.zeros(len(labels.names), vocab_size, dtype=torch.bool)
    found[labels.classes.astype(np.int64), dataset.tokens[:].astype(np.int64)] = True
    return found


class _Part(NamedTuple):
    """A batch's part of `Passed`, without labels."""

    tokens: NDArray[np.int64]
    loss: NDArray[np.float32]
    within: NDArray[np.float32]
    right: NDArray[np.bool_]
    chosen: dict[int, NDArray[np.bool_]]
    score: dict[int, NDArray[np.float32]]


@torch.no_grad()
def _run(
    model: MegadynForCausalLM,
    samples: SampleSet,
    count: int,
    batch_size: int,
    layers: list[int],
    labels: Labels,
    candidates: torch.Tensor,
) -> Iterator[_Part]:
    """Batches of samples, which are consecutive in the file: the labels of what follows are one ahead."""
    classes = torch.from_numpy(labels.classes.astype(np.int64))
    batches = range(0, count, batch_size)
    for first in each(batches, "measuring", len(batches)):
        ids = range(first, min(first + batch_size, count))
        tokens, following = (torch.from_numpy(part).to(model.device) for part in read_batch(samples, ids))
        output = model(tokens, use_cache=False, output_routing=True)
        logits, wanted = output.logits.float().flatten(0, 1), following.flatten()
        at = first * samples.sequence_length + 1
        inside = candidates[classes[at : at + len(wanted)]].to(model.device)
        among = logits.masked_fill(~inside, -torch.inf)
        yield _Part(
            tokens.flatten().cpu().numpy(),
            F.cross_entropy(logits, wanted, reduction="none").cpu().numpy(),
            F.cross_entropy(among, wanted, reduction="none").cpu().numpy(),
            (among.argmax(dim=1) == wanted).cpu().numpy(),
            {layer: output.routing[layer].flatten().cpu().numpy() for layer in layers},
            {
                layer: output.gates[layer].float().flatten().cpu().numpy()
                for layer in layers
                if output.gates[layer] is not None
            },
        )


def _joined(parts: list[_Part], labels: Labels, layers: list[int]) -> Passed:
    count = sum(len(part.loss) for part in parts)
    following = slice(1, count + 1)  # samples are consecutive in the file, so that labels are one ahead
    scored = [layer for layer in layers if layer in parts[0].score]
    return Passed(
        np.concatenate([part.tokens for part in parts]),
        labels.classes[following],
        labels.hops[following],
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.within for part in parts]),
        np.concatenate([part.right for part in parts]),
        {layer: np.concatenate([part.chosen[layer] for part in parts]) for layer in layers},
        {layer: np.concatenate([part.score[layer] for part in parts]) for layer in scored},
    )


def by_group(passed: Passed, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Per class and hops that occur: `tokens`, mean `loss` and `within` (see `Passed`), `accuracy`, and `chosen`, the share
    chosen by layer."""
    found = []
    for code in np.unique(passed.classes.astype(np.int64) * 256 + passed.hops):
        of_class, hops = divmod(int(code), 256)
        inside = (passed.classes == of_class) & (passed.hops == hops)
        found.append(
            {
                "class": names[of_class],
                "hops": hops,
                "tokens": int(inside.sum()),
                "loss": float(passed.loss[inside].mean()),
                "within": float(passed.within[inside].mean()),
                "accuracy": float(passed.right[inside].mean()),
                "chosen": {str(layer): float(mask[inside].mean()) for layer, mask in passed.chosen.items()},
            }
        )
    return found


def by_layer(passed: Passed) -> dict[str, dict[str, float | None]]:
    """Per layer that chooses: `share` of tokens chosen, and `area`: of its score against *needs depth*, None if it has none."""
    deep = passed.hops > 0
    return {
        str(layer): {
            "share": float(mask.mean()),
            "area": area_under_curve(passed.score[layer], deep) if layer in passed.score else None,
        }
        for layer, mask in passed.chosen.items()
    }


def area_under_curve(score: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """The probability that a positive scores higher than a negative, ties counting half (the area under the ROC curve).

    None if there are only positives or only negatives, or a score is NaN.
    """
    yes = int(positive.sum())
    no = len(positive) - yes
    if not yes or not no or np.isnan(score).any():
        return None
    _, which, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2  # of equal scores, counted from 1
    return float((mean_rank[which][positive].sum() - yes * (yes + 1) / 2) / (yes * no))
