"""Small decode calls for NVIDIA's compute-sanitizer, on a GPU; each is checked too.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py --backend mosaic_gpu
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

# Before jax starts: each kernel a launch of its own, and no memory taken in advance.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "pallas_kernels"))

import jax
import numpy as np
from oracles import assert_within, make_paged, paged_attention

from pallas_kernels.paged_decode import paged_decode

LENGTHS = (0, 1, 64, 130, 300)
HEADS_AND_TOKENS = ((1, 1), (16, 2), (64, 1), (65, 1), (128, 1), (126, 2))
OPTIONS = ({}, {"num_splits": 3}, {"deterministic": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="mosaic_gpu", choices=("mosaic_gpu", "triton"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    for (heads, tokens), page_size, rope in itertools.product(HEADS_AND_TOKENS, (8, 64), (0, 64)):
        case = make_paged(
            rng,
            lengths=LENGTHS,
            page_size=page_size,
            heads=heads,
            tokens=tokens,
            latent=512,
            rope=rope,
            dtype="bfloat16",
        )
        want_out, want_lse = paged_attention(case, 0.05)
        for options in OPTIONS:
            run = jax.jit(
                lambda *arrays, options=options: paged_decode(
                    *arrays, sm_scale=0.05, backend=args.backend, **options
                )
            )
            out, lse = run(*case.args)
            assert_within(out, want_out, {1.0: 3e-2})
            assert_within(lse, want_lse, {1.0: 1e-3})
            print(f"{args.backend}: {heads=} {tokens=} {page_size=} {rope=} {options}", flush=True)


if __name__ == "__main__":
    main()
