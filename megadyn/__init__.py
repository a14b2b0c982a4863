"""Pretraining of routed transformers under tensor and pipeline parallelism."""

__version__ = "0.1.0"
