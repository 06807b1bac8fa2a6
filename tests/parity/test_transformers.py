"""Parity with transformers' DeepseekV2 and DeepseekV3 on random checkpoints that it saved itself.

Weights are drawn so that every part has a say: unit-variance projections, norms away from one, a
routing bias. Where a reference's own routing is so close to a tie that float32 rounding could
choose another expert, the weights and prompts are drawn again; only the reference decides that.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax import lax
from safetensors.torch import load_file, save_file

from mla_jax import Decoder, PageAllocator, PagedLatentCache, decode_step, prefill
from mla_jax.checkpoint import load_checkpoint, save_checkpoint

# Warnings of libraries that only the reference uses.
pytestmark = pytest.mark.filterwarnings("ignore")

# Threads cost more than they save at these sizes.
torch.set_num_threads(1)

TOLERANCE = 1e-4
NEW_TOKENS = 64
PROMPT_LENGTHS = (19, 1, 33, 8)
PAGE_SIZE = 16

# No size is a power of two, and no two are equal.
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 70,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 26,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "n_routed_experts": 9,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "max_position_embeddings": 192,
    "bos_token_id": None,
    "eos_token_id": None,
}
DIRECT = {"q_lora_rank": None}
DENSE = {"first_k_dense_replace": 3}
TIED = {"tie_word_embeddings": True}
GROUPED = {"topk_method": "group_limited_greedy"}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
HALVES = {"rope_interleave": False}


def yarn(**settings: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "beta_fast": 8.0,
    }
    return {"rope_parameters": rope | settings}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 direct query, greedy": ("V2", DIRECT | {"n_shared_experts": 2}),
    "v2 low-rank query, groups, route scale": ("V2", GROUPED | {"routed_scaling_factor": 3.0}),
    "v2 yarn, equal mscales": ("V2", DIRECT | yarn(mscale=0.7, mscale_all_dim=0.7)),
    "v2 yarn, two mscales, groups": ("V2", GROUPED | yarn(mscale=0.707, mscale_all_dim=1.3)),
    "v2 yarn, no mscale, dense, tied": ("V2", DENSE | TIED | yarn()),
    "v3 low-rank query, groups": ("V3", {}),
    "v3 direct query, one group": ("V3", DIRECT | ONE_GROUP | {"norm_topk_prob": False}),
    "v3 yarn, equal mscales": ("V3", yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3 yarn, attention factor": (
        "V3",
        DIRECT | yarn(attention_factor=1.2, mscale_all_dim=0.5, truncate=False),
    ),
    "v3 halves, yarn, one mscale": ("V3", HALVES | yarn(mscale_all_dim=0.8)),
    "v3 halves, no yarn, dense, tied": ("V3", HALVES | DENSE | TIED),
    "v3 moe in every layer, no shared experts": (
        "V3",
        {"first_k_dense_replace": 0, "n_shared_experts": 0, "rms_norm_eps": 1e-3},
    ),
}


def random_reference(version: str, changes: dict[str, Any], rng: np.random.Generator) -> Any:
    """A transformers model with weights from `rng`."""
    config = getattr(transformers, f"Deepseek{version}Config")(**SIZES | changes)
    model = getattr(transformers, f"Deepseek{version}ForCausalLM")(config).eval()
    # The default, grouped products, wants sizes that are multiples of 16 bytes.
    model.set_experts_implementation("eager")
    tensors = dict(model.named_parameters())
    tensors |= {k: v for k, v in model.named_buffers() if k.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                value = 0.2 * rng.standard_normal(tensor.shape)
            elif tensor.ndim == 1:
                value = rng.uniform(0.5, 1.5, tensor.shape)
            else:
                fan_in = 1 if "embed_tokens" in name else max(tensor.shape[-1], 1)
                value = rng.standard_normal(tensor.shape) * fan_in**-0.5
            tensor.copy_(torch.from_numpy(value.astype(np.float32)))
    return model


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def routing_margin(router: Any, logits: np.ndarray) -> float:
    """How far the closest of a router's decisions on these logits is from another choice."""
    logits = logits.astype(np.float64)
    is_sigmoid = hasattr(router, "e_score_correction_bias")
    if is_sigmoid:
        scores = 1 / (1 + np.exp(-logits)) + router.e_score_correction_bias.numpy()
    else:
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)

    def margin(values: np.ndarray, chosen: int) -> float:
        if chosen == values.shape[1]:
            return 1.0
        ordered = -np.sort(-values, axis=-1)
        return float((ordered[:, chosen - 1] - ordered[:, chosen]).min())

    closest = 1.0
    if is_sigmoid or router.topk_method != "greedy":
        grouped = scores.reshape(len(scores), router.num_group, -1)
        best = np.sort(grouped, axis=-1)[..., -2 if is_sigmoid else -1 :].sum(axis=-1)
        closest = margin(best, router.topk_group)
        rank = np.argsort(np.argsort(-best, axis=-1), axis=-1)
        scores = np.where(rank[..., None] < router.topk_group, grouped, -1e9).reshape(scores.shape)
    return min(closest, margin(scores, router.top_k))


def watch_margins(model: Any) -> list[float]:
    """A list that grows by the margin of every routing from now on."""
    margins: list[float] = []

    def watch(router: Any, _: Any, output: tuple[Any, ...]) -> None:
        margins.append(routing_margin(router, output[0].numpy()))

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(watch)
    return margins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    model: Any
    prompts: list[list[int]]
    sequences: list[list[int]]  # prompts and greedy continuations
    logits: list[np.ndarray]  # [length, vocab] of each sequence


def reference(version: str, changes: dict[str, Any], seed: int) -> Reference:
    """Random weights and prompts on which no routing decision is nearly a tie."""
    for attempt in range(20):
        rng = np.random.default_rng([seed, attempt])
        model = random_reference(version, changes, rng)
        margins = watch_margins(model)
        prompts = [rng.integers(0, SIZES["vocab_size"], n).tolist() for n in PROMPT_LENGTHS]
        sequences = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
            sequences.append(out[0].tolist())
            assert len(sequences[-1]) == len(prompt) + NEW_TOKENS
        logits = [logits_of(model, sequence) for sequence in sequences]
        if min(margins, default=1.0) > 3e-6:
            return Reference(model=model, prompts=prompts, sequences=sequences, logits=logits)
    raise AssertionError("20 draws in a row had a routing decision that was nearly a tie")


def relative_error(got: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def pad(rows: list[list[int]]) -> jax.Array:
    width = max(map(len, rows))
    return jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32)


@nnx.jit
def whole(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@nnx.jit
def through_pages(
    model: Decoder, prompts: jax.Array, counts: jax.Array, fed: jax.Array, cache: PagedLatentCache
) -> tuple[jax.Array, PagedLatentCache]:
    """Logits [1 + steps, batch, vocab] after the prompts, and after each row of `fed`."""
    first, cache = prefill(model, prompts, cache, counts=counts)

    def step(cache: PagedLatentCache, tokens: jax.Array) -> tuple[PagedLatentCache, jax.Array]:
        logits, cache = decode_step(model, tokens, cache)
        return cache, logits

    cache, rest = lax.scan(step, cache, fed)
    return jnp.concatenate([first[None], rest]), cache


def scattered_cache(model: Decoder, lengths: list[int]) -> PagedLatentCache:
    """A cache whose rows' pages are interleaved in a pool that has some to spare."""
    max_pages = -(-(max(lengths) + NEW_TOKENS) // PAGE_SIZE)
    allocator = PageAllocator(len(lengths) * max_pages + 3, page_size=PAGE_SIZE)
    spare = allocator.allocate(3 * PAGE_SIZE)
    rows = [allocator.allocate(length) for length in lengths]
    allocator.free(spare)
    for _ in range(4):
        for row in rows:
            assert allocator.extend(row, NEW_TOKENS // 4) == []
    cache = PagedLatentCache.create(
        model.config,
        num_pages=allocator.num_pages,
        page_size=PAGE_SIZE,
        max_batch=len(rows),
        max_pages=max_pages,
    )
    return cache.with_rows(jnp.asarray(allocator.table(rows, max_pages)), cache.lengths)


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_same_greedy_tokens(name: str, seed: int, tmp_path: Path) -> None:
    version, changes = CASES[name]
    expected = reference(version, changes, seed)
    expected.model.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert model.config.dtype == "float32"

    logits = np.asarray(whole(model, pad(expected.sequences)))
    for row, reference_logits in zip(logits, expected.logits, strict=True):
        assert relative_error(row[: len(reference_logits)], reference_logits) < TOLERANCE

    # Feed the reference's tokens, so that one tie could not make the rest incomparable.
    lengths = [len(prompt) for prompt in expected.prompts]
    continuations = np.array([s[n:] for s, n in zip(expected.sequences, lengths, strict=True)])
    paged, cache = through_pages(
        model,
        pad(expected.prompts),
        jnp.array(lengths, jnp.int32),
        jnp.asarray(continuations[:, :-1].T, jnp.int32),
        scattered_cache(model, lengths),
    )
    np.testing.assert_array_equal(np.asarray(cache.lengths), np.array(lengths) + NEW_TOKENS - 1)
    paged = np.asarray(paged)
    ties = 0
    for row, length in enumerate(lengths):
        reference_logits = expected.logits[row][length - 1 : -1]
        assert relative_error(paged[:, row], reference_logits) < TOLERANCE
        second, first = np.sort(reference_logits, axis=-1)[:, -2:].T
        is_tie = first - second < TOLERANCE * np.abs(reference_logits).max()
        agrees = paged[:, row].argmax(axis=-1) == continuations[row]
        assert (agrees | is_tie).all()
        ties += is_tie.sum()
    assert ties <= 0.02 * continuations.size


def alterations() -> list[Any]:
    rope = yarn(mscale=0.7, mscale_all_dim=1.0)["rope_parameters"]
    in_rope = {
        "factor": 3.0,
        "original_max_position_embeddings": 96,
        "beta_fast": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "rope_theta": 700.0,
        "truncate": False,
        "attention_factor": 1.1,
    }
    elsewhere = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_interleave": False,
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": False,
        "topk_group": 3,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-2,
    }
    altered = {key: {"rope_parameters": rope | {key: value}} for key, value in in_rope.items()}
    altered |= {key: {key: value} for key, value in elsewhere.items()}
    return [pytest.param(changes, id=key) for key, changes in altered.items()]


@pytest.mark.parametrize("altered", alterations())
def test_every_setting_matters(altered: dict[str, Any], seed: int) -> None:
    """Agreement above is no accident: each setting moves the reference by far more than 1e-4."""
    settings = yarn(mscale=0.7, mscale_all_dim=1.0)
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], 97).tolist()
    before, after = (
        logits_of(random_reference("V3", settings | more, np.random.default_rng(seed)), tokens)
        for more in ({}, altered)
    )
    assert relative_error(after, before) > 10 * TOLERANCE


def parameters(model: Decoder) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(value.get_value()) for path, value in state}


def assert_same(got: Decoder, expected: Decoder) -> None:
    assert got.config == expected.config
    for name, parameter in parameters(expected).items():
        np.testing.assert_array_equal(parameters(got)[name], parameter, err_msg=name)


def test_shards_that_transformers_wrote(rng: np.random.Generator, tmp_path: Path) -> None:
    model = random_reference("V3", {}, rng)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_same(load_checkpoint(tmp_path / "many"), load_checkpoint(tmp_path / "one"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_as_transformers_saved_it(
    dtype: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = random_reference("V3", {}, rng).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    loaded = parameters(load_checkpoint(tmp_path))
    assert loaded["layers.1.ffn.router.bias"].dtype == np.float32
    assert loaded["embed"].dtype == jnp.dtype(dtype)
    kv_b = model.model.layers[2].self_attn.kv_b_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(loaded["layers.2.attn.wkv_b.weight"].astype(np.float32), kv_b)


@pytest.mark.parametrize("name", list(CASES)[::2])
def test_transformers_reads_what_we_save(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    version, changes = CASES[name]
    original = random_reference(version, changes, rng)
    original.save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "ours")
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", experts_implementation="eager"
    )
    tokens = rng.integers(0, SIZES["vocab_size"], 80).tolist()
    # Not equal to the bit: a model without routing is saved as a V3, whatever it was.
    assert relative_error(logits_of(reread.eval(), tokens), logits_of(original, tokens)) < 1e-5


@pytest.mark.parametrize("block", [[16, 24], [128, 128]])
def test_fp8_blocks(block: list[int], rng: np.random.Generator, tmp_path: Path) -> None:
    """A V3 checkpoint in FP8 is the checkpoint of the weights that its codes and scales mean."""
    random_reference("V3", {}, rng).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    state, quantized = {}, {}
    for key, tensor in tensors.items():
        state[key] = quantized[key] = tensor
        if "_proj" not in key:
            continue
        meant = torch.empty_like(tensor)
        codes = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        rows, columns = (range(0, n, b) for n, b in zip(tensor.shape, block, strict=True))
        scales = torch.empty(len(rows), len(columns))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                part = (slice(row, row + block[0]), slice(column, column + block[1]))
                scales[i, j] = tensor[part].abs().max() / 448
                codes[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[part] = codes[part].float() * scales[i, j]
        state[key] = meant
        quantized[key], quantized[f"{key}_scale_inv"] = codes, scales
    assert len(quantized) > len(tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    for path, stored in ((tmp_path / "fp8", quantized), (tmp_path / "meant", state)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        save_file(stored, path / "model.safetensors")
    fp8 = load_checkpoint(tmp_path / "fp8", dtype="float32")
    assert_same(fp8, load_checkpoint(tmp_path / "meant", dtype="float32"))
    assert load_checkpoint(tmp_path / "fp8").config.dtype == "bfloat16"
