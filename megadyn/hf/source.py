"""Whether a run can start from the weights of a Hugging Face folder."""

from pathlib import Path

from megadyn.config import ModelConfig
from megadyn.config.folders import OURS, another_form
from megadyn.config.shape import shape_of
from megadyn.errors import UserError
from megadyn.hf.reader import HfFolder
from megadyn.kinds import DENSE


def open_source(path: Path, model: ModelConfig, length: int) -> HfFolder:
    """The folder `path`, from whose weights a run of `model` on sequences of `length` tokens can start.

    Raises:
        UserError: no Hugging Face folder, a run or a checkpoint of ours or of another program, or another model.
    """
    if form := another_form(path):
        more = "; to go on with the optimizer's state too, give the path as checkpoint.fork_from instead"
        raise UserError(f"{path} {form}{more if OURS in form else ''}")
    folder = HfFolder(path)
    there, here = folder.model.routing, model.routing
    if there.name not in (DENSE, here.name):
        raise UserError(
            f"{path}: that is a {there.name} model, this is {here.name} (model.routing.kind): only a dense model can "
            "become one of another kind"
        )
    was, now = (shape_of(shape, length) for shape in (folder.model, model))
    found = [
        f"model.{key} is {was[key]!r} there and {now[key]!r} here" for key in was if was[key] != now[key]
    ]
    if not found and there.name != DENSE:
        found = _routing_differences(folder.model, model)
    if found:
        raise UserError(f"{path} is another model: {'; '.join(found)}")
    return folder


def _routing_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Between two models of one kind and shape, in what decides which tensors there are."""
    found = []
    if there.layer_types != here.layer_types:
        layouts = (
            "".join("T" if layer == DENSE else "D" for layer in model.layer_types) for model in (there, here)
        )
        found.append("model.routing.layout is {} there and {} here".format(*layouts))
    there_sizes, here_sizes = there.routing.sizes(there), here.routing.sizes(here)
    found += [
        f"{key} gives {there_sizes[key]} there and {here_sizes[key]} here"
        for key in here_sizes
        if there_sizes[key] != here_sizes[key]
    ]
    return found
