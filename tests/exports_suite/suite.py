"""transformers' ModelTesterMixin over each kind of our exported model."""

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM, MegadynModel
from tests.hf.tiny_models import LAYOUTS

PACKAGE = "transformers_own_tests"
NOT_SHIPPED = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Modules that test_modeling_common imports and the source archive lacks, and the class that it wants of each."""

KINDS = {
    "dense": "dense",
    "dtf": "dtf4",
    "mod": "mod",
    "dtrnet-token": "dtrnet-token",
    "dtrnet-expert": "dtrnet-expert",
    "fixed": "fixed",
    "nested": "nested",
    "subskip": "subskip",
    "skip_middle": "skip_middle",
    "stt": "stt",
}
"""Name in the table of known failures: key of LAYOUTS."""


def common_tests(folder: Path) -> ModuleType:
    """transformers' test_modeling_common of the unpacked archive, with empty classes in place of what is not shipped."""
    name = f"{PACKAGE}.test_modeling_common"
    if name not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        for module_name, class_name in NOT_SHIPPED.items():
            parent = ModuleType(f"{PACKAGE}.{module_name.split('.')[0]}")
            parent.__path__ = []
            sys.modules[parent.__name__] = parent
            module = ModuleType(f"{PACKAGE}.{module_name}")
            setattr(module, class_name, type(class_name, (), {}))
            sys.modules[module.__name__] = module
        # Tests ask these tables, which know no model from outside, whether a class takes labels.
        common_module = importlib.import_module(name)
        common_module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megadyn"] = "MegadynForCausalLM"
        common_module.MODEL_MAPPING_NAMES["megadyn"] = "MegadynModel"
    return sys.modules[name]


class Tester:
    """What transformers' tests ask about a model: a tiny configuration, and inputs for it."""

    batch_size, seq_length, is_training = 3, 14, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, kind: str) -> None:
        layer_types, self.routing = LAYOUTS[KINDS[kind]]
        # One dense or decision layer, one routed; of skip_middle a layer and its mirror image.
        self.num_hidden_layers = 2
        self.layer_types = layer_types[1:3] if kind == "skip_middle" else layer_types[:2]

    def get_config(self) -> MegadynConfig:
        return MegadynConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=128,
            routed_layer_types=self.layer_types,
            routing=self.routing,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MegadynConfig, dict[str, Any]]:
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        # the last tokens of a row are padding, as transformers' own testers have it
        mask = torch.ones_like(tokens).tril(0)
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


def suite_of(kind: str, folder: Path, names: list[str] | None = None) -> unittest.TestSuite:
    """All tests for one kind, or those named."""
    common = common_tests(folder)
    case = type(
        f"Conformance_{kind}",
        (common.ModelTesterMixin, unittest.TestCase),
        {
            "all_model_classes": (MegadynModel, MegadynForCausalLM),
            "setUp": lambda self: setattr(self, "model_tester", Tester(kind)),
        },
    )
    names = names or unittest.TestLoader().getTestCaseNames(case)
    return unittest.TestSuite(case(name) for name in names)
