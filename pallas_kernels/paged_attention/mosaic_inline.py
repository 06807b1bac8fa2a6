"""What Pallas has no operation for, written in the dialect below it."""

# Pallas' decorator changes a function's arguments, and MLIR's stubs know few of its overloads.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools

import numpy as np
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


def rescale_if_needed(acc, keep):
    """acc times its row's `keep`, in those warps whose `keep` is not all 1: most rows' is."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=plgpu.Layout.WGMMA),
    )
    def rescale(ctx, acc, keep):
        del ctx
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
        types = [register.type for register in acc.registers.flat]
        branch = scf.IfOp(anyone, types, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = acc * keep.broadcast_in_dim(acc.shape, (0,), acc.layout)
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(acc.registers.flat))
        registers = np.array(list(branch.results), dtype=object).reshape(acc.registers.shape)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=acc.layout, _is_signed=acc.is_signed
        )

    return rescale(acc, keep)
