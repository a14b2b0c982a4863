"""Shows which tokens of a real text the routed layers of a checkpoint process."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megadyn.config import Config, load_config
from megadyn.data.batches import read_batch
from megadyn.data.labels import labels_path, read_labels
from megadyn.data.samples import SampleSet
from megadyn.errors import UserError
from megadyn.evaluation.saved import load_network, open_saved
from megadyn.kinds import DENSE
from megadyn.network import Network, routed_layers, set_routing_mode
from megadyn.routing.layer import RoutedLayer
from megadyn.routing.select import Selection, as_mask
from megadyn.tokenization.tokenizer import Tokenizer, load_tokenizer
from megadyn.training.data import open_data


class TextMap(NamedTuple):
    pieces: list[str]
    """The text of each token [N]; empty if the next token completes its character."""
    layers: list[int]
    """Indices of the R routed layers."""
    processed: NDArray[np.bool_]
    """[R, N]"""
    loss: float
    """Mean next-token loss over the tokens, in nats."""
    following: list[tuple[str, int]] = []
    """Class and steps needed of the token that each token predicts [N]; empty if the dataset has no labels beside it."""


def map_text(run: Path, checkpoint: Path, tokens: int) -> TextMap:
    """The first `tokens` tokens of the first validation sample, routed causally by `checkpoint` on the CPU.

    A causal rule does not look ahead, so these are also the decisions within the whole sample.
    Raises UserError if the checkpoint is damaged, the model is dense, or tokenizer or dataset cannot be opened.
    """
    config = load_config(checkpoint / "config.yaml")
    if config.model.routing.name == DENSE:
        raise UserError("the model is dense: every token passes through every layer")
    base = launch_folder(run, config)
    try:
        with contextlib.chdir(base):  # the configuration's paths are relative to it
            tokenizer = load_tokenizer(config.tokenizer.path)
            ids, labels, following = first_sample(config, tokenizer, tokens)
            saved = open_saved(checkpoint)
    except UserError as error:
        raise UserError(f"{error} (paths are relative to {base})") from None
    saved.model.attention = "sdpa"  # the other backends need a GPU
    network = load_network(saved, torch.device("cpu"))
    layers, processed, loss = processed_tokens(network, torch.from_numpy(ids), torch.from_numpy(labels))
    return TextMap(pieces(tokenizer, ids[0].tolist()), layers, processed, loss, following)


def launch_folder(run: Path, config: Config) -> Path:
    """The folder in which the run was started, if its relative output folder reveals that; otherwise the working directory."""
    parts = Path(config.output_dir).parts
    if not Path(config.output_dir).is_absolute() and run.parts[-len(parts) :] == parts:
        return Path(*run.parts[: -len(parts)])
    return Path.cwd()


def first_sample(
    config: Config, tokenizer: Tokenizer, tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[str, int]]]:
    """(ids, labels), each [1, N], N at most `tokens`; and `TextMap.following`. Raises UserError for ids that the tokenizer does
    not have."""
    samples = next(iter(open_data(config, start=None).validations.values()), None)
    if samples is None:
        raise UserError("the run has no validation set")
    ids, labels = (part[:, :tokens].copy() for part in read_batch(samples, [0]))
    if (largest := int(max(ids.max(), labels.max()))) >= tokenizer.vocab_size:
        raise UserError(
            f"the validation set holds token id {largest}, but tokenizer {tokenizer.name} has "
            f"only {tokenizer.vocab_size} ids"
        )
    following: list[tuple[str, int]] = []
    if isinstance(samples, SampleSet) and labels_path(samples.dataset.prefix).exists():
        what = read_labels(samples.dataset)
        for place in samples.places(0)[1 : 1 + ids.shape[1]].tolist():
            following.append((what.names[what.classes[place]], int(what.hops[place])))
    return ids, labels, following


@torch.no_grad()
def processed_tokens(
    network: Network, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[list[int], NDArray[np.bool_], float]:
    """One causal pass over ids [1, N]. Returns the routed layers, which tokens each processed [R, N], and the loss."""
    routed = routed_layers(network)
    set_routing_mode(routed, "causal")
    seen: dict[int, NDArray[np.bool_]] = {}

    def add(index: int, choice: Selection) -> None:
        mask = as_mask(choice, ids.shape)[0].numpy()
        # A layer may choose separately for attention and MLP.
        seen[index] = mask | seen[index] if index in seen else mask

    for layer in routed:
        watch(layer, add)
    loss = float(network(ids, labels))
    return list(seen), np.stack(list(seen.values())), loss


def watch(layer: RoutedLayer, tell: Callable[[int, Selection], None]) -> None:
    """Calls tell(layer index, selection) whenever the layer runs its block, because `Layer.run` receives the selection."""
    run = layer.run

    def watched(function: Callable[..., Any], *inputs: Any) -> Any:
        for choice in (value for value in inputs if isinstance(value, Selection)):
            tell(layer.index, choice)
        return run(function, *inputs)

    layer.run = watched  # type: ignore[method-assign]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. Bytes of an incomplete character count for the token that completes it."""
    found: list[str] = []
    done = 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        end = len(text) if count == len(ids) else len(text.rstrip("\ufffd"))
        found.append(text[done:end])
        done = max(done, end)
    return found
