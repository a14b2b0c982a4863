"""Fine-tuning an exported model with `transformers.Trainer`."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from megadyn.hf.convert import write_code
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.kinds import find_kind
from tests.hf.tiny_models import MAIN_KINDS, random_tokens, tiny_model

STEPS = 8


# its new name is not in all of 5.x
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_trainer_learns_with_gradient_checkpointing_as_without(kind, tmp_path):
    losses, weights = {}, {}
    for checkpointing in (False, True):
        model = tiny_model(kind)
        rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 16, seed=3)]
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path / str(checkpointing)),
                per_device_train_batch_size=4,
                max_steps=STEPS,
                learning_rate=3e-3,
                gradient_checkpointing=checkpointing,
                use_cpu=True,
                logging_steps=1,
                disable_tqdm=True,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=rows,
        )
        trainer.train()
        assert model.is_gradient_checkpointing == checkpointing
        losses[checkpointing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights[checkpointing] = model.state_dict()
        trainer.save_model(str(tmp_path / "saved"))
    assert len(losses[True]) == STEPS
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert_close(weights[True], weights[False])
    assert sum(losses[True][-2:]) < sum(losses[True][:2]) - 0.1, (
        "eight sequences, seen four times, are learnt"
    )
    again = MegadynForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = random_tokens(2, 12, seed=4)
    with torch.no_grad():
        assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits)


def trainer_of(
    model: torch.nn.Module, folder: Path, steps: int, collator: DataCollatorWithFlattening | None = None
) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8, 16, seed=3)]
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=steps,
            learning_rate=3e-3,
            use_cpu=True,
            lr_scheduler_type="constant",
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            save_steps=2,
            seed=5,
        ),
        train_dataset=rows,
        data_collator=collator,
    )


@pytest.mark.parametrize("kind", ["dtf5"])
def test_fine_tuning_of_an_export_is_resumed(kind, tmp_path):
    """From a folder with the code beside the weights, as users have it: four steps straight, and two and two."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "export")
    write_code(tmp_path / "export", find_kind(model.config.routing["kind"]))

    def loaded() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)

    straight = trainer_of(loaded(), tmp_path / "straight", 4)
    straight.train()
    trainer_of(loaded(), tmp_path / "halves", 2).train()
    resumed = trainer_of(loaded(), tmp_path / "halves", 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_close(resumed.model.state_dict(), straight.model.state_dict())
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (straight, resumed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (tmp_path / "halves" / "checkpoint-4" / "config.json").is_file()


def test_padding_free_fine_tuning_is_that_of_padded_rows(tmp_path):
    losses = []
    for collator in (None, DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        trainer = trainer_of(tiny_model("dtf5"), tmp_path / str(len(losses)), 3, collator)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
