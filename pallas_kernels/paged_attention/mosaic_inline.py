"""What Pallas has no operation for, written in the dialect below it."""

# Pallas' decorator changes a function's arguments, and MLIR's stubs know few of its overloads.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools

import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector


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


def store_pieces(ref, value):
    """value to device memory, where neighbouring threads do not write whole sectors."""
    store = getattr(plgpu, "store", None)
    if store is None:  # jax 0.11 does not ask whether that is meant
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def take(ref, index, count: int = 1):
    """The arrays ref[count * index + i], i < count, of a list in device memory.

    index: int32 [rows] by `row_layout()`.
    """
    layout = row_layout()

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=[plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout=layout)] * count,
    )
    def take(ctx, ref, index):
        del ctx
        kind = ir.MemRefType(ref.type).element_type
        size = mgpu.utils.bytewidth(kind)
        found = [np.empty_like(index.registers) for _ in range(count)]
        for at, i in np.ndenumerate(index.registers):
            place = _address(ref, vector.extract(i, [], [0]), count * size)
            whole = ir.VectorType.get((count,), kind)
            aligned = size * (count & -count)
            values = llvm.load(whole, place, alignment=aligned, invariant=True)
            for j in range(count):
                value = vector.extract(values, [], [j])
                found[j][at] = vector.broadcast(ir.VectorType.get((1,), kind), value)
        return [_array(one, layout) for one in found]

    return take(ref, index)


def take_rows(ref, row, first: int, columns: int):
    """[rows, columns] of a pool [pages, page, width]: columns from `first` on of its slots `row`.

    row: int32 [rows] by `row_layout()`, counted over all pages; columns: a multiple of 64.
    """
    (rows,), width = row.shape, ref.shape[-1]
    layout = tile_layout()

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), row_layout()),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), ref.dtype, layout=layout),
    )
    def take_rows(ctx, ref, row):
        del ctx
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        kind = ir.MemRefType(ref.type).element_type
        size = mgpu.utils.bytewidth(kind)
        vector_type = ir.VectorType.get((VECTOR,), kind)
        words_type = ir.VectorType.get((VECTOR * size // 4,), i32)
        lane = arith.remui(mgpu.thread_idx(), arith.constant(i32, 64 // VECTOR))
        lane = arith.extui(i64, arith.muli(lane, arith.constant(i32, VECTOR)))
        found = np.empty(layout.to_mgpu().registers_shape((rows, columns)), dtype=object)
        by_row = found.reshape(len(row.registers.flat), columns // 64)
        for i, one in enumerate(row.registers.flat):
            slot = arith.extsi(i64, vector.extract(one, [], [0]))
            slot = arith.addi(arith.muli(slot, arith.constant(i64, width)), lane)
            for j in range(columns // 64):
                place = arith.addi(slot, arith.constant(i64, first + 64 * j))
                address = _address(ref, place, size)
                words = llvm.load(words_type, address, alignment=VECTOR * size, invariant=True)
                by_row[i, j] = vector.bitcast(vector_type, words)
        return _array(found, layout)

    return take_rows(ref, row)


def keep_rows(numbers, present):
    """numbers [rows, columns] by `tile_layout()`, but 0, whatever they are, where a row is not.

    present: bool [rows] by `row_layout()`.
    """
    layout = tile_layout()

    @plgpu.inline_mgpu(
        arg_types=(layout, row_layout()),
        return_type=plgpu.ShapeDtypeStruct(numbers.shape, numbers.dtype, layout=layout),
    )
    def keep_rows(ctx, numbers, present):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        kind = ir.VectorType(numbers.registers.flat[0].type)
        words_type = ir.VectorType.get(
            (VECTOR * mgpu.utils.bitwidth(kind.element_type) // 32,), i32
        )
        zeros = arith.constant(words_type, ir.DenseElementsAttr.get_splat(words_type, _zero(i32)))
        found = np.empty_like(numbers.registers)
        rows = numbers.registers.reshape(present.registers.size, -1)
        kept = found.reshape(rows.shape)
        for (i, j), register in np.ndenumerate(rows):
            there = vector.extract(present.registers.flat[i], [], [0])
            words = arith.select(there, vector.bitcast(words_type, register), zeros)
            kept[i, j] = vector.bitcast(kind, words)
        return _array(found, layout)

    return keep_rows(numbers, present)


VECTOR = 8
"""Neighbouring columns that a thread holds of a gathered tile."""


@functools.cache
def tile_layout():
    """Of gathered rows: eight threads hold 64 columns of a row, a warp four rows of 16.

    So a thread has few rows, to which scales and ids belong, and eight threads store one line of a
    swizzled box.
    """
    return plgpu.Layout.TILED(
        fragmented_array.Tiling(((16, 64), (4, 64), (VECTOR,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def row_layout():
    """Of one number for each gathered row."""
    return tile_layout().reduce(1)


def _zero(kind):
    return ir.IntegerAttr.get(kind, 0)


def _address(ref, index, size: int):
    """Of a number of an array in device memory, counted over all of it."""
    i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
    if index.type != i64:
        index = arith.extsi(i64, index)
    offset = arith.muli(index, arith.constant(i64, size))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], i8)


def _array(registers, layout):
    kind = ir.VectorType(registers.flat[0].type).element_type
    return mgpu.FragmentedArray(
        _registers=registers,
        _layout=layout.to_mgpu(),
        _is_signed=True if isinstance(kind, ir.IntegerType) else None,
    )


def over_rows(v, shape: tuple[int, ...]):
    """v[row] over every column of `shape`."""
    return lax.broadcast_in_dim(v, shape, [0])


def over_columns(v, shape: tuple[int, ...]):
    """v[column] over every row of `shape`."""
    return lax.broadcast_in_dim(v, shape, [1])


_PAIRWISE = {"max": arith.maximumf, "sum": arith.addf}


def over_own_keys(op: str, x):
    """The "max" or "sum" of every column of x [64, columns] over the rows that a thread has.

    So it differs between threads, whatever its layout says, until `over_keys` has had it.
    """
    columns = x.shape[1]
    layout = plgpu.Layout.WGMMA.reduce(0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((columns,), x.dtype, layout=layout),
    )
    def reduce(ctx, x):
        del ctx
        own = [_PAIRWISE[op](*halves) for halves in x.registers.reshape(-1, 2)]
        shape = layout.to_mgpu().registers_shape((columns,))
        return _array(np.array(own, dtype=object).reshape(shape), layout)

    return reduce(x)


def over_keys(op: str, x, scratch):
    """The "max" or "sum" of all threads' x [columns], by `over_own_keys`.

    scratch: float32 [4 * columns] of this warpgroup's own, which no warp may still read. It may be
    written again behind the next barrier.
    """
    (columns,) = x.shape
    pairwise = _PAIRWISE[op]
    layout = plgpu.Layout.WGMMA.reduce(0)

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((columns,), x.dtype, layout=layout),
    )
    def reduce(ctx, x, scratch):
        del ctx
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

        def constant(number):
            return arith.constant(i32, number)

        def at(row, column):
            place = arith.addi(arith.muli(row, constant(columns)), column)
            return [arith.index_cast(index, place)]

        thread = mgpu.thread_idx()
        warp = arith.remui(arith.divui(thread, constant(32)), constant(4))
        pair = arith.muli(arith.remui(thread, constant(4)), constant(2))
        own = list(x.registers.flat)
        for distance in (4, 8, 16):
            own = [pairwise(o, mgpu.utils.shfl_bfly(o, distance)) for o in own]
        places = [arith.addi(pair, constant(8 * i)) for i in range(len(own))]
        for o, place in zip(own, places, strict=True):
            vector.store(o, scratch, at(warp, place))
        mgpu.warpgroup_barrier()
        found = []
        for o, place in zip(own, places, strict=True):
            parts = [vector.load(o.type, scratch, at(constant(w), place)) for w in range(4)]
            found.append(pairwise(pairwise(*parts[:2]), pairwise(*parts[2:])))
        return _array(np.array(found, dtype=object).reshape(x.registers.shape), layout)

    return reduce(x, scratch)


def rescale_if_needed(acc, keep, axis: int = 0):
    """The arrays of acc times `keep` of their rows (axis 0) or columns.

    Skipped in warps whose `keep` is all 1: most is.
    """
    shapes = [plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=plgpu.Layout.WGMMA) for a in acc]

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.Layout.WGMMA for _ in acc), plgpu.Layout.WGMMA.reduce(1 - axis)),
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
            scaled = [a * keep.broadcast_in_dim(a.shape, (axis,), a.layout) for a in acc]
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
