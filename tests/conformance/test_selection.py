"""A few of transformers' own tests on every kind of model; `make conformance` runs all of them."""

import pytest

from tests.conformance.run import known_failures, run
from tests.conformance.source import tests_folder

KINDS = ("dense", "dtf", "mod", "dtrnet-token", "dtrnet-expert")
TESTS = ["test_attention_outputs", "test_batching_equivalence", "test_causal_lm_loss_honors_shift_labels",
         "test_gradient_checkpointing_enable_disable", "test_hidden_states_output", "test_init_weights_can_init_buffers",
         "test_inputs_embeds", "test_keep_in_fp32_modules_exist", "test_save_load", "test_training"]


@pytest.mark.skipif(not tests_folder().is_dir(), reason="transformers' source archive is not here: make conformance fetches it")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_tests(kind: str) -> None:
    ran, _, failures = run(kind, tests_folder(), TESTS)
    assert ran == len(TESTS)
    assert failures.keys() == known_failures(kind).keys() & set(TESTS), "\n".join(failures.values())


def test_table_is_whole() -> None:
    for kind in KINDS:
        assert all(known_failures(kind).values())


@pytest.mark.skipif(not tests_folder().is_dir(), reason="transformers' source archive is not here: make conformance fetches it")
def test_a_broken_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner sees a fault of the model."""
    from megadyn.hf.modeling_megadyn import SwiGLU

    whole = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: whole(self, x) + x.mean())      # mixes the rows of a batch
    assert run("mod", tests_folder(), ["test_batching_equivalence"])[2].keys() == {"test_batching_equivalence"}
