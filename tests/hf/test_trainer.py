"""Fine-tuning an exported model with `transformers.Trainer`."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from tests.hf.tiny_models import MAIN_KINDS, random_tokens, tiny_model

STEPS = 8


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")       # its new name is not in all of 5.x
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_trainer_learns_with_gradient_checkpointing_as_without(kind, tmp_path):
    losses, weights = {}, {}
    for checkpointing in (False, True):
        model = tiny_model(kind)
        rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 16, seed=3)]
        trainer = Trainer(model, TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=3e-3,
            gradient_checkpointing=checkpointing, use_cpu=True, logging_steps=1, disable_tqdm=True, report_to=[],
            save_strategy="no"), train_dataset=rows)
        trainer.train()
        assert model.is_gradient_checkpointing == checkpointing
        losses[checkpointing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights[checkpointing] = model.state_dict()
        trainer.save_model(str(tmp_path / "saved"))
    assert len(losses[True]) == STEPS
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert_close(weights[True], weights[False])
    assert sum(losses[True][-2:]) < sum(losses[True][:2]) - 0.1, "eight sequences, seen four times, are learnt"
    again = MegadynForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = random_tokens(2, 12, seed=4)
    with torch.no_grad():
        assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits)
