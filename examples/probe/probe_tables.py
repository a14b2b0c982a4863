"""Tables and figures of the probe's rows; `probe.py` makes the rows."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megadyn.benchmark.experiments import Row, markdown, mean_and_spread, pyplot
from megadyn.data.indexed import IndexedDataset
from megadyn.data.labels import read_labels
from megadyn.prepare.probe import ANSWERS, Language

# ---- tables ----------------------------------------------------------------------------------------------------------


def groups_of(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Class and hops of what can be predicted, in order: text, then answers."""
    found = {(group["class"], group["hops"]) for row in rows for group in row["groups"]}
    deep = sorted(
        (group for group in found if group[0] in ANSWERS), key=lambda of: (ANSWERS.index(of[0]), of[1])
    )
    return [("text", 0), *deep]


def name_of(group: tuple[str, int]) -> str:
    return f"{group[0]} {group[1]}" if group[1] else group[0]


def values(rows: Sequence[Row], group: tuple[str, int], key: str) -> list[Any]:
    """A value of this group, per row."""
    return [of[key] for row in rows for of in row["groups"] if (of["class"], of["hops"]) == group]


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by model and overrides, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(" ".join([row["model"], *row["overrides"]]), []).append(row)
    return found


CAPACITY = "model.routing.capacity="


def by_capacity(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the capacity that overrides name; under "" those with the capacity of their configuration, and dense ones."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        named = [word.removeprefix(CAPACITY) for word in row["overrides"] if word.startswith(CAPACITY)]
        found.setdefault(named[-1] if named else "", []).append(row)
    return found


def is_dense(row: Row) -> bool:
    """Whether every layer of the model processes every token."""
    return bool(row["kind"] == "dense") and not row["overrides"]


def say_capacity(name: str) -> str:
    """A model's name with its overrides, as short as it can be read."""
    return name.replace("model.routing.", "")


def loss_table(rows: Sequence[Row]) -> str:
    """Of the dense models, a column for each, means over seeds: loss and accuracy by class and hops."""
    models = by_model([row for row in rows if is_dense(row)])
    lines = [["seeds", *(str(len(runs)) for runs in models.values())]]
    for group in groups_of(rows):
        cells = []
        for runs in models.values():
            losses, accuracies = (values(runs, group, key) for key in ("within", "accuracy"))
            cells.append(f"{mean_and_spread(losses)} ({statistics.mean(accuracies):.0%})" if losses else "-")
        lines.append([name_of(group), *cells])
    return markdown(["", *models], lines)


def accuracy_table(rows: Sequence[Row]) -> str:
    """A line per model, means over seeds, from the best: operations, loss, what top-k's loss is below it, accuracy by class."""
    groups = [group for group in groups_of(rows) if group != ("text", 0)]
    lines = []
    for name, runs in by_model(rows).items():
        gaps = [
            row["validation"]["causal"] - row["validation"]["topk"]
            for row in runs
            if "topk" in row.get("validation", {})
        ]
        accuracies = [values(runs, group, "accuracy") for group in groups]
        lines.append(
            (
                statistics.mean(row["loss"] for row in runs),
                [
                    say_capacity(name),
                    str(len(runs)),
                    f"{statistics.mean(row['flops_per_token'] for row in runs) / 1e6:.1f}",
                    mean_and_spread([row["loss"] for row in runs]),
                    f"{statistics.mean(gaps):z.4f}" if gaps and runs[0]["layers"] else "-",
                    *(f"{statistics.mean(of):.0%}" if of else "-" for of in accuracies),
                ],
            )
        )
    head = ["model", "seeds", "MFLOP", "loss", "gap", *map(name_of, groups)]
    return markdown(head, [line for _, line in sorted(lines, key=lambda of: of[0])])


def choice_table(rows: Sequence[Row]) -> str:
    """Per routed layer, mean over seeds: share chosen of all tokens and by class and hops, and the area under the curve."""
    routed = [row for row in rows if row["layers"]]
    groups = [("table", 0), *groups_of(routed)]
    lines = []
    for name, runs in by_model(routed).items():
        for layer in runs[0]["layers"]:
            found = [row["layers"][layer] for row in runs]
            areas = [of["area"] for of in found if of["area"] is not None]
            shares = [[of[layer] for of in values(runs, group, "chosen")] for group in groups]
            lines.append(
                [
                    say_capacity(name),
                    layer,
                    f"{statistics.mean(of['share'] for of in found):.0%}",
                    mean_and_spread(areas) if areas else "-",
                    *(f"{statistics.mean(share):.0%}" if share else "-" for share in shares),
                ]
            )
    return markdown(["model", "layer", "chosen", "area", *map(name_of, groups)], lines) if lines else ""


def tables(rows: Sequence[Row]) -> list[str]:
    """Those of which there are rows: with the capacities of the configurations; then for each other one, beside dense models."""
    of_capacity = by_capacity(rows)
    usual = of_capacity.pop("", [])
    found = [accuracy_table(usual), loss_table(usual), choice_table(usual)] if usual else []
    dense = [row for row in usual if is_dense(row)]
    for group in of_capacity.values():
        found += [accuracy_table([*dense, *group]), choice_table(group)]
    return [table for table in found if table]


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_depth(rows: Sequence[Row], path: Path) -> None:
    """Of the models in which no layer chooses: loss of a list's state against its steps, and of all else against depth."""
    dense = [row for row in rows if is_dense(row) and row["model"] != "dense_narrow"]
    of_depth = {
        depth: [row for row in dense if row["layers_of_model"] == depth]
        for depth in sorted({row["layers_of_model"] for row in dense})
    }
    groups = groups_of(dense)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for depth, runs in of_depth.items():
        found = {group[1]: values(runs, group, "within") for group in groups if group[0] == "state"}
        draw_means(left, found, "-", f"{depth} layers")
    left.set_xlabel("permutations in the list")
    left.set_ylabel("loss of the answer among its class, nats")
    for group in groups:
        if group[0] != "state":
            found = {depth: values(runs, group, "within") for depth, runs in of_depth.items()}
            draw_means(right, found, {"text": ":", "sum": "--"}.get(group[0], "-"), name_of(group))
    right.set_xlabel("dense layers")
    right.set_xticks(list(of_depth))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


BOTH = ("dense_8", "dense_6", "oracle")
FIRST = (*BOTH, "dense_4", "dense_2", "fixed_random", "mod", "dtf")
"""Models of the first figure of lists; the second has all others, and in BOTH those that they are compared with."""
AT_OTHER_CAPACITIES = ("dense_8", "dense_5", "dense_4")
"""Dense models that those with another capacity than their configuration's are compared with."""


def draw_all_lists(rows: Sequence[Row], folder: Path) -> None:
    """`draw_lists` several times, because more than ten curves cannot be told apart: `lists.png` and `kinds.png`, where beside a
    model without overrides those with overrides are; and `capacity_C.png` for each capacity that overrides name."""
    of_capacity = by_capacity(rows)
    usual = of_capacity.pop("", [])
    plain = {row["model"] for row in usual if not row["overrides"]}
    of_first = [
        row for row in usual if row["model"] in FIRST and not (row["overrides"] and row["model"] in plain)
    ]
    others = [row for row in usual if row not in of_first]
    compared = [row for row in of_first if row["model"] in BOTH] if others else []
    parts = {"lists": of_first, "kinds": [*compared, *others]}
    dense = [row for row in usual if row["model"] in AT_OTHER_CAPACITIES and not row["overrides"]]
    parts |= {f"capacity_{capacity}": [*dense, *group] for capacity, group in of_capacity.items()}
    for name, part in parts.items():
        if part:
            draw_lists(part, folder / f"{name}.png")


def draw_lists(rows: Sequence[Row], path: Path) -> None:
    """Of every model: accuracy on lists by their steps; and the share of these positions that its routed layers took."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, runs in by_model(rows).items():
        label = textwrap.shorten(
            say_capacity(name), 40, placeholder=" ..."
        )  # the legend must fit into the figure
        of_list = [group for group in groups_of(runs) if group[0] == "state"]
        found = {group[1]: values(runs, group, "accuracy") for group in of_list}
        look = {"color": str(1 - runs[0]["layers_of_model"] / 10), "lw": 1} if is_dense(runs[0]) else {}
        style = ":" if name == "dense_narrow" else "--" if look else "-"
        line = draw_means(left, found, style, label, **look)
        taken = {
            group[1]: [statistics.mean(of.values()) for of in values(runs, group, "chosen")]
            for group in of_list
            if runs[0]["layers"]
        }
        if taken:
            draw_means(right, taken, "-", label, color=line.get_color())
    left.set_ylabel("accuracy, routed causally")
    right.set_ylabel("share of positions in routed layers")
    for axis in (left, right):
        axis.set_xlabel("permutations in the list: steps needed")
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_means(axis: Any, found: dict[int, list[float]], style: str, label: str, **look: Any) -> Any:
    """A line through the means of what was found at each place, and a dot for each value."""
    means = [statistics.mean(of) if of else math.nan for of in found.values()]
    line = axis.plot(list(found), means, style, label=label, **look)[0]
    for place, of in found.items():
        axis.scatter([place] * len(of), of, s=14, color=line.get_color())
    return line


def draw_samples(rows: Sequence[Row], language: Language, data: Path, path: Path) -> None:
    """The first document: above, the steps that it takes to predict what follows each token; below, what the routed layers of
    each model with the lowest seed processed, at the capacity of its configuration. `data`: the labelled documents that the rows
    were measured on."""
    usual = by_capacity(rows).get("", [])
    known = [row for row in usual if row.get("sample")]  # not of dense models, and not in older rows
    routed = {name: min(runs, key=lambda row: row["seed"]) for name, runs in by_model(known).items()}
    if not routed:
        return
    dataset = IndexedDataset(data)
    length = language.length
    words = [language.vocabulary[token] for token in dataset.tokens[:length]]
    needed = read_labels(dataset).hops[1 : length + 1].astype(float)
    heights = [1, *(len(row["sample"]) for row in routed.values())]
    figure, (above, *below) = pyplot().subplots(
        len(heights), 1, figsize=(0.13 * length + 2, 1.2 + 0.2 * sum(heights)), layout="constrained", sharex=True,
        height_ratios=heights,
    )  # fmt: skip
    above.imshow(needed[None], aspect="auto", cmap="Oranges", vmin=0, vmax=max(1.0, needed.max()))
    above.set_yticks([0], ["steps needed"], fontsize=8)
    for axis, (name, row) in zip(below, routed.items(), strict=True):
        taken = np.array([[float(mark) for mark in marks] for marks in row["sample"].values()])
        axis.imshow(taken, aspect="auto", cmap="Blues", vmin=0, vmax=1.3)
        axis.set_yticks(range(len(taken)), list(row["sample"]), fontsize=7)
        axis.set_ylabel(
            textwrap.fill(say_capacity(name), 15), rotation=0, ha="right", va="center", fontsize=8
        )
    below[-1].set_xticks(range(length), words, rotation=90, fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
