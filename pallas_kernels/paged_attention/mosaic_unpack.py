"""e4m3 keys in shared memory, to float16 in registers: a product's first operand.

A warp loads what its lanes need by `ldmatrix`, in the order in which a lane's bytes lie:

- rows of keys, for scores: the columns of each 16 come in another order, which the queries share;
- columns of latents, for values: two neighbouring latents stand 8 rows apart in each 16, and come
  together again when a result is stored.
"""

# The stubs of Pallas' decorators say less than is there, and MLIR's know few of its overloads.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from pallas_kernels.paged_attention.mosaic_block import BOX, KEYS, Block

OPERAND = jnp.float16
"""What keys are unpacked to, so queries and probabilities are of it, too."""


def in_row_order(x: Array) -> Array:
    """x with the columns of each 16 as `unpack_rows` has them."""
    four = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return four.swapaxes(-3, -2).reshape(x.shape)


def in_column_order(x: Array) -> Array:
    """x [latents, ...] with the latents of each 16 as `unpack_columns` has them."""
    return x.reshape(-1, 8, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def in_memory_order(x: Array) -> Array:
    """What `in_column_order` undoes."""
    return x.reshape(-1, 2, 8, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def unpack_rows(c: Block, ref, first: int) -> Array:
    """float16 [keys, BOX]: columns from `first` on of e4m3 [keys, columns] in shared memory."""
    columns = ref.shape[-1]
    if c.interpret:
        return in_row_order(ref[:, first : first + BOX].astype(OPERAND))

    @plgpu.inline_mgpu(
        arg_types=(_packed(columns),),
        return_type=plgpu.ShapeDtypeStruct((KEYS, BOX), OPERAND, layout=plgpu.Layout.WGMMA),
    )
    def unpack_rows(ctx, ref):
        del ctx
        lane, warp = _lane_and_warp()
        # Four matrices: keys 0 to 7 and 8 to 15 of the warp's, in two neighbouring 16 columns.
        key = _add(_multiply(warp, 16), _remainder(lane, 16))
        base, start = _start(ref), _place(key, _quotient(lane, 16), columns)
        found = []
        for column in range(first, first + BOX, 32):
            words = _matrices(_add(base, _toggle(start, column)), transposed=False)
            for upper, lower in (words[:2], words[2:]):
                halves = zip(_unpack(upper), _unpack(lower), strict=True)
                found += [half for pair in halves for half in pair]
        return _array(found, (KEYS, BOX))

    return unpack_rows(ref)


def unpack_columns(c: Block, ref, first: int) -> Array:
    """float16 [BOX, keys]: columns from `first` on of e4m3 [keys, columns] in shared memory."""
    columns = ref.shape[-1]
    if c.interpret:
        return in_column_order(ref[:, first : first + BOX].astype(OPERAND).T)

    @plgpu.inline_mgpu(
        arg_types=(_packed(columns),),
        return_type=plgpu.ShapeDtypeStruct((BOX, KEYS), OPERAND, layout=plgpu.Layout.WGMMA),
    )
    def unpack_columns(ctx, ref):
        del ctx
        lane, warp = _lane_and_warp()
        # Four matrices: 32 keys of the warp's 16 columns.
        base, start = _start(ref), _place(lane, warp, columns)
        found = []
        for key in range(0, KEYS, 32):
            place = _add(_add(base, _toggle(start, first)), _constant(key * columns))
            for word in _matrices(place, transposed=True):
                # A lane's bytes are two latents of one key, two of the next.
                found += _unpack(_shuffle(word, 0x3120))
        return _array(found, (BOX, KEYS))

    return unpack_columns(ref)


def clear_keys(c: Block, ref, first: int, width: int, valid):
    """Keys from `valid` on become 0 in these columns of e4m3 [keys, columns] in shared memory."""
    columns = ref.shape[-1]
    if c.interpret:
        own = ref.at[:, pl.ds(first, width)]
        keys = own[...]
        own[...] = jnp.where(jnp.arange(KEYS)[:, None] < valid, keys, jnp.zeros_like(keys))
        return
    layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=(_packed(columns), layout))
    def clear_keys(ctx, ref, valid):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), i32)
        zero = ir.DenseElementsAttr.get_splat(words, ir.IntegerAttr.get(i32, 0))
        zero = arith.constant(words, zero)
        thread, chunks = _remainder(mgpu.thread_idx(), 128), width // 16
        base, valid = _start(ref), vector.extract(valid.registers.flat[0], [], [0])
        for at in range(0, KEYS * chunks, 128):
            piece = _add(thread, _constant(at))
            key, chunk = _quotient(piece, chunks), _remainder(piece, chunks)
            place = _place(key, _add(chunk, _constant(first // 16)), columns)
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.sge, key, valid)):
                llvm.store(zero, _pointer(_add(base, place)), alignment=16)

    clear_keys(ref, plgpu.layout_cast(lax.broadcast(valid, (KEYS,)), layout))


def load_scales(c: Block, place) -> list[Array]:
    """Of each group of columns the scale of every key, float32 [keys], from shared memory."""
    groups = c.groups
    if c.interpret:
        scales = c.scales_s[place].reshape(KEYS, groups)
        return [scales[:, group] for group in range(groups)]
    layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=[plgpu.ShapeDtypeStruct((KEYS,), jnp.float32, layout=layout)] * groups,
    )
    def load(ctx, ref):
        del ctx
        lane, warp = _lane_and_warp()
        first = _add(_multiply(warp, 16), _quotient(lane, 4))
        base, f32 = _start(ref), ir.F32Type.get()
        found = [[] for _ in range(groups)]
        for half in (0, 8):
            key = _add(first, _constant(half))
            place = _add(base, _multiply(key, 4 * groups))
            kind = ir.VectorType.get((groups,), f32)
            values = llvm.load(kind, _pointer(place), alignment=4 * (groups & -groups))
            for group, own in enumerate(found):
                value = vector.extract(values, [], [group])
                own.append(vector.broadcast(ir.VectorType.get((1,), f32), value))
        return [_array(own, (KEYS,), layout) for own in found]

    return load(c.scales_s.at[place])


def store_columns(c: Block, ref, value):
    """value [latents, rows], latents by `in_column_order`, to [rows, latents] in device memory."""
    if c.interpret:
        ref[...] = in_memory_order(value).T.astype(ref.dtype)
        return
    width, rows = value.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store_columns(ctx, ref, value):
        del ctx
        index, kind = ir.IndexType.get(), ir.MemRefType(ref.type).element_type
        f32 = ir.F32Type.get()
        lane, warp = _lane_and_warp()
        latent = _add(_multiply(warp, 16), _multiply(_quotient(lane, 4), 2))
        row = _multiply(_remainder(lane, 4), 2)
        tiles = value.registers.reshape(width // 64, rows // 8, 2)
        for m, n in np.ndindex(tiles.shape[:2]):
            for j in range(2):
                pair = [vector.extract(half, [], [j]) for half in tiles[m, n]]
                pair = vector.from_elements(ir.VectorType.get((2,), f32), pair)
                if kind != f32:
                    pair = arith.truncf(ir.VectorType.get((2,), kind), pair)
                at = [_add(row, _constant(8 * n + j)), _add(latent, _constant(64 * m))]
                vector.store(pair, ref, [arith.index_cast(index, i) for i in at])

    store_columns(ref, value)


def _packed(columns: int):
    return plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns)))


def _array(registers, shape, layout=plgpu.Layout.WGMMA):
    layout = layout.to_mgpu()
    registers = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _constant(number: int):
    return arith.constant(ir.IntegerType.get_signless(32), number)


def _add(a, b):
    return arith.addi(a, b)


def _multiply(a, number: int):
    return arith.muli(a, _constant(number))


def _quotient(a, number: int):
    return arith.divui(a, _constant(number))


def _remainder(a, number: int):
    return arith.remui(a, _constant(number))


def _toggle(a, number: int):
    return arith.xori(a, _constant(number)) if number else a


def _lane_and_warp():
    """Of this thread in its warpgroup."""
    thread = mgpu.thread_idx()
    return _remainder(thread, 32), _remainder(_quotient(thread, 32), 4)


def _start(ref):
    """The address of a place in shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def _pointer(address):
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)


def _place(row, chunk, columns: int):
    """Where 16 bytes of a row lie in rows of `columns` bytes: the copy engine swizzles them."""
    line = _remainder(_quotient(row, 128 // columns), columns // 16)
    return _add(_multiply(row, columns), _multiply(arith.xori(chunk, line), 16))


def _matrices(address, *, transposed: bool):
    """Four words, of four matrices whose rows' addresses the lanes give."""
    i32 = ir.IntegerType.get_signless(32)
    kind = ".trans" if transposed else ""
    words = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [address],
        f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, words, [i]) for i in range(4)]


def _shuffle(word, selector: int):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [word], f"prmt.b32 $0, $1, 0, {selector};", "=r,r")


def _unpack(word):
    """float16 pairs of a word's lower two bytes, and of the upper two."""
    i32, i16 = (ir.IntegerType.get_signless(bits) for bits in (32, 16))
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    halves = vector.bitcast(
        ir.VectorType.get((2,), i16), vector.broadcast(ir.VectorType.get((1,), i32), word)
    )
    found = []
    for i in range(2):
        half = vector.extract(halves, [], [i])
        both = llvm.inline_asm(i32, [half], "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h")
        found.append(mgpu.utils.bitcast(both, pair))
    return found
