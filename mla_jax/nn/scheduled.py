"""A layer's decode attention by a plan's schedule."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_jax.cache import LatentPool, PageView, write_pages
from mla_jax.decode_plan import DecodePlan
from mla_jax.nn.mla import MLA, Rotation
from mla_jax.quantization import QuantizedPool
from pallas_kernels.megakernel import decode_by_schedule


def scheduled_attention(
    attn: MLA,
    x: Float[Array, "batch 1 dim"],
    ckv_pool: LatentPool,
    kpe_pool: Float[Array, "pages page rope"],
    view: PageView,
    rope: Rotation,
    plan: DecodePlan,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch 1 dim"], Array, Array, DecodePlan]:
    """`attn.paged` for one token a row, by `plan`, which comes back for the next launch.

    A row that brings no token attends to nothing: it may have outgrown the plan, and NaN, the
    schedule's answer to that, could spread from it.
    """
    assert not isinstance(ckv_pool, QuantizedPool)  # `check_plan` refuses it
    q_nope, q_pe, ckv, kpe = attn.project(x, rope)
    ckv_pool, kpe_pool = write_pages(ckv_pool, view, ckv), write_pages(kpe_pool, view, kpe)
    out, signals = decode_by_schedule(
        *(plan.schedule, q_pe, attn.absorb_query(q_nope), kpe_pool, ckv_pool),
        view.page_ids.reshape(x.shape[0], -1),
        attn.config.softmax_scale,
        lengths=jnp.where(view.counts > 0, view.length, 0),
        signals=plan.signals,
        # In the interpreter processors run one after the other, and must not wait.
        queue="global" if interpret else "processors",
        backend=backend,
        interpret=interpret,
    )
    assert signals is not None
    out = attn.wo(attn.expand_values(out).reshape(x.shape[0], 1, -1))
    return out, ckv_pool, kpe_pool, plan._replace(signals=signals)
