"""`paged_decode` against the float64 oracle: one suite for every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_mla_tolerance import assert_flash_mla, draw, reference
from interpreted import needs_mosaic_gpu, no_races
from oracles import QUICK_COMPILE, PagedCase, assert_within, make_paged, paged_attention
from paged_decode_suite import (
    LSE,
    OUT,
    KernelSuite,
    PagedDecodeSuite,
    ragged,
)

from pallas_kernels.paged_attention.mosaic_gpu import KEYS, ROWS
from pallas_kernels.paged_decode import mosaic_gpu, paged_decode
from pallas_kernels.schedule import plan_workers


class TestReference(PagedDecodeSuite):
    backend, interpret = "reference", False

    @pytest.mark.parametrize(("latent", "rope", "page_size"), [(48, 24, 16), (20, 6, 5), (8, 2, 1)])
    def test_sizes_of_no_kernel(self, rng, latent, rope, page_size):
        lengths = ragged(page_size)
        self.check(
            make_paged(rng, lengths=lengths, page_size=page_size, heads=2, latent=latent, rope=rope)
        )

    def test_longer_than_a_step(self, rng):
        """Requests over several of its blocks of keys."""
        self.check(make_paged(rng, lengths=(256, 257, 700, 3), page_size=64, heads=2, tokens=2))


class TestTritonInterpreted(KernelSuite):
    backend = "triton"


@needs_mosaic_gpu
class TestMosaicInterpreted(KernelSuite):
    """Twins for few rows, a line for up to 64, clusters of two beyond; no race in any call."""

    backend = "mosaic_gpu"

    dtype = "bfloat16"
    latent, rope = 128, 64
    ropes = (0, 64)
    widths = ((128, 0), (256, 64), (384, 64), (512, 64))
    page_sizes = (8, 16, 32, 64, 128, 256)
    some_page_sizes = (8, 64, 128)
    head_counts = (1, 3, 9, 16, 64, 65, 126, 128)
    many_tokens = ((2, 64), (3, 43), (4, 5), (5, 16), (8, 9))
    half_precision = ((8, 1), (128, 5))
    longest = 700
    examples = 3

    narrowest = (128, 0)
    split_lengths = (1030, 1200)
    split_heads = ((33, 2),)
    flash_mla_heads = (126,)

    @pytest.fixture(autouse=True)
    def four_cores(self, monkeypatch):
        """A CPU has no number of cores, and the default one would give each segment a worker."""
        monkeypatch.setattr(mosaic_gpu, "DEFAULT_CORES", 4)

    @pytest.fixture(autouse=True)
    def no_races(self):
        with no_races():
            yield

    def check_plan(self, monkeypatch, case: PagedCase) -> tuple[list[int], list[int]]:
        """As the lengths and the cores ask for: (segments of each worker, of each request)."""
        asked = []

        def noted(steps, workers):
            asked.append(workers)
            return plan_workers(steps, workers)

        monkeypatch.setattr(mosaic_gpu, "plan_workers", noted)
        self.check(case, num_splits=None)
        [workers] = set(asked)
        step = 2 * KEYS if case.q_nope.shape[2] > ROWS else KEYS
        steps = (case.length + (step - 1)) // step
        plan = jax.jit(plan_workers, static_argnums=1)(steps, workers)
        return np.diff(np.asarray(plan.first)).tolist(), plan.split.parts.tolist()

    @pytest.mark.parametrize(("heads", "workers"), [(8, 4), (40, 4), (128, 2)])
    def test_several_segments_of_a_worker(self, rng, monkeypatch, heads, workers):
        """The next segment's queries and keys load while the last one computes; some are empty,
        and some have an odd number of tiles."""
        lengths = (130, 0, 1, 64, 200, 0, 65, 128, 300, 17, 0)
        case = self.make(rng, lengths=lengths, page_size=16, heads=heads)
        of_worker, _ = self.check_plan(monkeypatch, case)
        assert len(of_worker) == workers
        assert max(of_worker) >= 3

    @pytest.mark.parametrize(("heads", "workers"), [(8, 4), (128, 2)])
    def test_a_request_over_all_workers(self, rng, monkeypatch, heads, workers):
        case = self.make(rng, lengths=(1500,), page_size=64, heads=heads)
        assert self.check_plan(monkeypatch, case) == ([1] * workers, [workers])

    @pytest.mark.parametrize(("heads", "tokens", "latent"), [(3, 1, 128), (7, 2, 384)])
    def test_turns(self, rng, heads, tokens, latent):
        """Segments of no tile, of odd and of even numbers of them, split and not."""
        sizes = {"heads": heads, "tokens": tokens, "latent": latent, "page_size": 16}
        case = self.make(rng, lengths=(0, 65, 1, 200, 64, 130), **sizes)
        run = functools.partial(
            mosaic_gpu.paged_decode_mosaic,
            sm_scale=jnp.float32(0.07),
            num_splits=None,
            deterministic=False,
            interpret=True,
            tiles=mosaic_gpu.MosaicTiles(cluster=1, order="turns"),
        )
        out, lse = jax.jit(run)(*case.args)
        want_out, want_lse = paged_attention(case, 0.07)
        assert_within(out, want_out, OUT[self.dtype])
        assert_within(lse, want_lse, LSE)

    def test_vmap(self, rng):
        """Queries, lengths and starts of two calls over the same pools: one launch for both."""
        lengths = (70, 17, 0, 129)
        case = self.make(rng, lengths=lengths, page_size=16, heads=65)
        fields = ("q_nope", "q_pe", "start", "length")
        halves = {name: jnp.stack(jnp.split(getattr(case, name), 2)) for name in fields}
        mapped = dataclasses.replace(case, **halves)
        ids = jnp.stack([case.page_ids] * 2)
        mapped = dataclasses.replace(mapped, page_ids=ids)

        def run(*args):
            return paged_decode(*args, sm_scale=0.07, backend=self.backend, interpret=True)

        run = jax.jit(jax.vmap(run, (0, 0, None, None, 0, 0, 0)), compiler_options=QUICK_COMPILE)
        out, lse = run(*mapped.args)
        together = out.reshape(case.q_nope.shape), lse.reshape(case.q_nope.shape[:-1])
        self.compare(together, case, 0.07)

    def test_refuses_gradients(self, rng):
        case = self.make(rng, lengths=(3,), page_size=16, heads=2)

        def loss(q_nope):
            args = dataclasses.replace(case, q_nope=q_nope).args
            return paged_decode(*args, sm_scale=0.07, backend=self.backend, interpret=True)[1].sum()

        with pytest.raises(NotImplementedError, match=r"^paged_decode: the Pallas backends"):
            jax.grad(loss)(case.q_nope)
        loss(case.q_nope)  # it is the gradient that is refused

    def test_few_rows_of_many_requests(self, rng):
        """The line, as for 64 rows."""
        lengths = rng.integers(0, 90, mosaic_gpu.TWINS_REQUESTS + 1)
        self.check(self.make(rng, lengths=lengths, page_size=16, heads=3), num_splits=None)

    def test_several_tiles_of_rows(self, rng):
        """A request's rows in three clusters, the last of them short, each split or not."""
        case = self.make(rng, lengths=(400, 129), page_size=64, heads=100, tokens=3)
        self.check(case, num_splits=None)

    @pytest.mark.parametrize("heads", [8, 40, 128])
    def test_tiles_of_keys(self, rng, heads):
        """Each number of tiles, odd ones too, with a full last one, a short one, and one key."""
        sizes = {"page_size": 64, "heads": heads, "num_pages": 18, "num_ids": 30}
        for full in range(0, 320, 64):
            self.check(self.make(rng, lengths=(full + 64, full + 40, full + 1), **sizes))


def test_flash_mla_tolerance_can_fail(seed):
    case, unpaged = draw(seed, np.array([20, 0]), tokens=1, heads=2, most_keys=64)
    out, lse = reference(case, unpaged)
    base_2 = lse / np.log(2)
    assert_flash_mla(jnp.asarray(out), jnp.asarray(base_2), (out, lse))
    with pytest.raises(AssertionError, match="out: 1 of"):
        assert_flash_mla(
            out + 0.01 * (np.arange(out.size) == 7).reshape(out.shape), base_2, (out, lse)
        )
    with pytest.raises(AssertionError, match="lse: 2 of"):
        assert_flash_mla(out, base_2 + 1e-3, (out, lse))
    with pytest.raises(AssertionError):
        assert_flash_mla(out * 1.005, base_2, (out, lse))
