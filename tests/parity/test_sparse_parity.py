"""Parity with transformers' DeepseekV32: random checkpoints that it saved, sequences beyond topk.

transformers' indexer does not round to fp8, so it chooses other keys where scores are close. Two
things are compared in its place: which keys its own indexer leaves out, on the same hidden states,
and the logits of its model where each layer attends to the keys that ours chose.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_transformers import (
    TOLERANCE,
    logits_of,
    pad,
    random_reference,
    relative_error,
    scattered_cache,
    through_pages,
    watch_margins,
    whole,
)
from test_transformers import yarn as yarn_settings

from mla_jax.checkpoint import load_checkpoint, save_checkpoint
from mla_jax.indexer import select_keys

# Warnings of libraries that only the reference uses.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not hasattr(transformers, "DeepseekV32Config"),
        reason=f"transformers {transformers.__version__} has no DeepseekV32",
    ),
]

TOPK, STEPS = 64, 6
INDEXER: dict[str, Any] = {"index_n_heads": 7, "index_head_dim": 32, "index_topk": TOPK}
LENGTHS = (97, 66, 80, 20)
LEFT_OUT_ALIKE = 0.9
"""Of the keys that transformers' indexer leaves out, on average, those that ours leaves out too."""


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The positions that programs compiled from now on choose, one entry a layer and call."""
    made: list[np.ndarray] = []

    def recorded(*args: Any) -> jax.Array:
        chosen = select_keys(*args)
        jax.debug.callback(lambda x: made.append(np.asarray(x)), chosen, ordered=True)
        return chosen

    for module in ("mla_jax.indexer", "mla_jax.nn.indexer"):
        monkeypatch.setattr(f"{module}.select_keys", recorded)
    return made


def by_layer(choices: list[np.ndarray], layers: int) -> list[list[np.ndarray]]:
    """Each layer's choices, call by call; the list is empty then."""
    jax.effects_barrier()
    taken = [choices[layer::layers] for layer in range(layers)]
    choices.clear()
    return taken


def given(
    model: Any, tokens: list[int], chosen: list[np.ndarray]
) -> tuple[np.ndarray, list[float]]:
    """(logits where layer i attends to chosen[i] [tokens, topk], how alike what is left out is)."""
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

    own_choice, alike = DeepseekV32Indexer.forward, []

    def choose(indexer: Any, *args: Any, **options: Any) -> torch.Tensor:
        theirs = own_choice(indexer, *args, **options)[0].numpy()
        ours = chosen[indexer.layer_idx]
        for at in range(TOPK, len(tokens)):
            left_out = np.setdiff1d(np.arange(at + 1), theirs[at])
            alike.append(1 - np.isin(left_out, ours[at]).mean())
        # The mask that is made of them knows no -1; a token may come twice.
        own = np.arange(len(tokens))[:, None]
        return torch.from_numpy(np.where(ours < 0, own, ours).astype(np.int32))[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepseekV32Indexer, "forward", choose)
        return logits_of(model, tokens), alike


@pytest.mark.parametrize(
    "rope", [{}, yarn_settings(mscale=1.0, mscale_all_dim=1.0)], ids=["", "yarn"]
)
def test_same_logits(
    rope: dict[str, Any], seed: int, choices: list[np.ndarray], tmp_path: Path
) -> None:
    """Without a cache, and through pages: a prefill and some steps."""
    for attempt in range(20):
        rng = np.random.default_rng([seed, attempt])
        reference = random_reference("V32", INDEXER | rope, rng)
        sequences = [rng.integers(0, 131, n).tolist() for n in LENGTHS]
        reference.save_pretrained(tmp_path / str(attempt))
        model = load_checkpoint(tmp_path / str(attempt))
        layers = model.config.n_layers

        logits = np.asarray(whole(model, pad(sequences)))
        forward = [calls[0] for calls in by_layer(choices, layers)]

        prompts = [sequence[:-STEPS] for sequence in sequences]
        counts = [len(prompt) for prompt in prompts]
        fed = jnp.asarray([sequence[-STEPS:] for sequence in sequences], jnp.int32).T
        stepped, _ = through_pages(
            model, pad(prompts), jnp.asarray(counts, jnp.int32), fed, scattered_cache(model, counts)
        )
        stepped = np.asarray(stepped)
        paged = by_layer(choices, layers)

        margins, alike = watch_margins(reference), []
        errors = []
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            want, same = given(
                reference, sequence, [chosen[row, : len(sequence)] for chosen in forward]
            )
            errors.append(relative_error(logits[row, : len(sequence)], want))
            alike += same
            chosen = [
                np.concatenate([first[row, :count], *(later[row] for later in rest)])
                for first, *rest in paged
            ]
            want, _ = given(reference, sequence, chosen)
            errors.append(relative_error(stepped[:, row], want[count - 1 :]))
        if min(margins) > 3e-6:  # no expert was nearly another
            assert max(errors) < TOLERANCE
            assert np.mean(alike) > LEFT_OUT_ALIKE
            return
    raise AssertionError("20 draws in a row had a routing decision that was nearly a tie")


def test_transformers_reads_what_we_save(rng: np.random.Generator, tmp_path: Path) -> None:
    original = random_reference("V32", INDEXER, rng)
    original.save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "ours")
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", experts_implementation="eager"
    )
    assert type(reread) is type(original)
    tokens = rng.integers(0, 131, 90).tolist()
    assert relative_error(logits_of(reread.eval(), tokens), logits_of(original, tokens)) < 1e-5
