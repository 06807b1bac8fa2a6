"""What Pallas has no operation for, written in the dialect below it."""

# Pallas' decorator changes a function's arguments, and MLIR's stubs know few of its overloads.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools

import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector


def synchronize():
    """A barrier among this warpgroup's threads."""

    @plgpu.inline_mgpu()
    def synchronize(ctx):
        del ctx
        mgpu.warpgroup_barrier()

    synchronize()


def fence():
    """What this thread wrote to shared memory is there for products before it arrives anywhere."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        del ctx
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


def over_rows(v, shape: tuple[int, ...]):
    """v[row] over every column of `shape`."""
    return lax.broadcast_in_dim(v, shape, [0])


def rescale_if_needed(acc, keep):
    """The arrays of acc times their rows' `keep`, in warps whose `keep` is not all 1: most is."""
    shapes = [plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=plgpu.Layout.WGMMA) for a in acc]

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.Layout.WGMMA for _ in acc), plgpu.Layout.WGMMA.reduce(1)),
        return_type=shapes,
    )
    def rescale(ctx, *arrays):
        del ctx
        *acc, keep = arrays
        values = [
            vector.extract(k, [], [i])
            for k in keep.registers.flat
            for i in range(ir.VectorType(k.type).shape[0])
        ]
        one = arith.constant(ir.F32Type.get(), 1.0)
        changed = [arith.cmpf(arith.CmpFPredicate.UNE, value, one) for value in values]
        changed = functools.reduce(arith.ori, changed)
        everyone = arith.constant(ir.IntegerType.get_signless(32), 0xFFFFFFFF)
        anyone = nvvm.vote_sync(everyone, changed, "any")
        registers = [register for a in acc for register in a.registers.flat]
        branch = scf.IfOp(anyone, [register.type for register in registers], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = [a * keep.broadcast_in_dim(a.shape, (0,), a.layout) for a in acc]
            scf.yield_([register for a in scaled for register in a.registers.flat])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        results, found = list(branch.results), []
        for a in acc:
            own, results = results[: a.registers.size], results[a.registers.size :]
            found.append(
                mgpu.FragmentedArray(
                    _registers=np.array(own, dtype=object).reshape(a.registers.shape),
                    _layout=a.layout,
                    _is_signed=a.is_signed,
                )
            )
        return found

    return rescale(*acc, keep)
