"""A dense exported model has no layers of its own: DenseLayer is part of every export."""

from megadyn.hf.configuration_megadyn import ExportedKind, Router

EXPORTED = ExportedKind({}, {"none": Router()})
