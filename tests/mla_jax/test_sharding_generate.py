"""Generation on a mesh: the tokens of one device."""

import json

import jax
import pytest
from meshed import AXIS_TYPES, CONFIG, label, mesh_of, model
from test_cli import run

from mla_jax import OutOfPagesError, generate
from mla_jax.bench.timing import compilations
from mla_jax.generate import BLOCK_STEPS, decode_block, stream

NEW = BLOCK_STEPS + 5


def draw_prompts(rng, *lengths: int) -> list[list[int]]:
    return [rng.integers(0, CONFIG.vocab, length).tolist() for length in lengths]


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=label)
@pytest.mark.parametrize(
    "shape",
    [{"model": 8}, {"data": 2, "model": 4}, {"data": 4, "context": 2}, {"model": 2, "context": 4}],
    ids=label,
)
def test_greedy_tokens_are_those_of_one_device(seed, rng, shape, axis_type):
    """Five rows, which two and four groups of requests do not divide."""
    prompts = draw_prompts(rng, 1, 7, 16, 17, 33)
    want = generate(model(seed), prompts, max_new_tokens=NEW, page_size=16)
    mesh, before = mesh_of(shape, axis_type), compilations(decode_block)
    got = generate(model(seed), prompts, max_new_tokens=NEW, page_size=16, mesh=mesh)
    assert got == want
    assert compilations(decode_block) == before + 1
    # It is not left set for the caller.
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=label)
def test_samples_are_those_of_one_device(seed, rng, axis_type):
    """Every row draws the same noise, wherever it lies."""
    prompts = draw_prompts(rng, 3, 20, 9)
    arguments = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": seed}
    want = generate(model(seed), prompts, **arguments)
    mesh = mesh_of({"data": 2, "model": 4}, axis_type)
    assert generate(model(seed), prompts, **arguments, mesh=mesh) == want


def test_fewer_rows_than_groups(seed, rng):
    prompts = draw_prompts(rng, 11)
    want = generate(model(seed), prompts, max_new_tokens=4)
    assert generate(model(seed), prompts, max_new_tokens=4, mesh=mesh_of({"data": 8})) == want


def test_each_group_has_its_share_of_the_pages(seed):
    mesh = mesh_of({"data": 2, "context": 2})
    arguments = {"max_new_tokens": 4, "page_size": 4, "mesh": mesh, "ignore_eos": True}
    progress = list(stream(model(seed), [[1] * 5, [2], [3]], **arguments))
    # The first group may fill three pages and two, the second as many; an even number in each.
    assert progress[0].num_pages == 12
    assert [p.pages_in_use for p in progress] == [4, 4]
    with pytest.raises(OutOfPagesError, match=r"^out of pages: needed 1, free 0, total 2$"):
        generate(model(seed), [[1] * 5, [2], [3]], num_pages=4, **arguments)
    with pytest.raises(ValueError, match=r"^num_pages: got 10, expected a multiple of"):
        generate(model(seed), [[1]], num_pages=10, **arguments)


def test_a_mesh_that_does_not_divide_the_model(seed):
    with pytest.raises(ValueError, match=r"^mesh: got model=3, expected a divisor of n_heads=8$"):
        generate(model(seed), [[1]], max_new_tokens=4, mesh=mesh_of({"model": 3}))


def test_the_command_line(capsys):
    command = ("generate", "--json", "--ignore-eos", "--max-new-tokens", "20", "--prompt", "The")
    documents = []
    for mesh in ((), ("--mesh", "data=2,model=2,context=2")):
        status, out, _ = run(capsys, *command, *mesh)
        assert status == 0
        documents.append(json.loads(out)["sequences"])
    assert documents[1] == documents[0]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=2,width=4", "got 'data=2,width=4', expected sizes of data, model and context"),
        ("data=2,data=4", "got 'data=2,data=4'"),
        ("model", "got 'model'"),
        ("model=-1", "got 'model=-1'"),
        ("", "got ''"),
        ("model=0", "model: got 0, expected at least 1"),
        ("data=3,model=4", "got data=3 * context=1 * model=4, expected at most the 8 devices"),
        ("model=8", "mesh: got model=8, expected a divisor of moe.n_routed=4"),
    ],
)
def test_refusals_of_the_command_line(capsys, mesh, message):
    status, out, err = run(capsys, "generate", "--mesh", mesh, "--max-new-tokens", "1")
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
