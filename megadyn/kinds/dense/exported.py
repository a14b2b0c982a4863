"""A dense exported model has no layers of its own: DenseLayer is every kind's."""

from megadyn.hf.configuration_megadyn import ExportedKind, Router

EXPORTED = ExportedKind({}, {"none": Router()})
