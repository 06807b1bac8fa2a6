# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # The megakernel's schedules
#
# A decode step over a few long sequences leaves most of a GPU idle, unless each sequence is cut and
# its parts are merged. `mla_jax.megakernel.schedule` decides on the host who does what: *partials*
# attend over a stretch of keys, *reductions* merge the results of some of them, in a tree. The plan
# is a table of instructions, 32 words each, which one launch executes.
#
# This notebook draws plans, executes one in NumPy, and recomputes the measure by which trees are
# chosen. The algorithm and its constants, readings from an H100, are ThunderKittens'.

# %%
import itertools
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from mla_jax import megakernel
from mla_jax.bench import report
from mla_jax.bench.schedules import SHAPES

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
rng = np.random.default_rng(SEED)
print("seed", SEED)

# %% [markdown]
# ## Timelines
#
# A line is a processor. A reduction's time includes what it waits for its inputs; the gaps of a
# good plan lie at its end.


# %%
def draw(plan, title):
    _, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for op, colour in {"partial": "#0072B2", "reduction": "#E69F00"}.items():
        events = [event for event in plan.timeline() if event.op == op]
        spans = np.array([[event.start, event.end - event.start] for event in events])
        if len(spans):
            places = [event.processor for event in events]
            axes.barh(places, spans[:, 1], left=spans[:, 0], height=0.9, color=colour, label=op)
    axes.set(xlabel="µs under the cost model", ylabel="processor", title=title)
    axes.axvline(plan.makespan, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, loc="lower right")
    plt.show()


plans = {name: megakernel.schedule(*shape, num_processors=132) for name, shape in SHAPES.items()}
for name, plan in plans.items():
    ops = [event.op for event in plan.timeline()]
    counts = {op: ops.count(op) for op in ("partial", "reduction")}
    print(f"{name:16} {counts['partial']:4} partials {counts['reduction']:4} reductions "
          f"{plan.makespan:7.1f} µs")  # fmt: skip
draw(plans["four-s45118-n4"], "1,696 to 45,118 keys, four sequences, four query tokens")

# %%
draw(plans["B64-ragged-n4"], "256 to 1,012 keys, 64 sequences, four query tokens")

# %% [markdown]
# ## What a plan has to keep
#
# Read from the table alone: for each sequence and query token, the keys of the partials under its
# final instruction are all keys, each once; a processor does one thing at a time; and a reduction
# ends after every partial that it needs.

# %%
PARTIAL, REDUCTION = 1, 2


def instructions(plan):
    return [words.tolist() for queue in plan.instructions for words in queue if words[0]]


def stretches(listed, new_tokens):
    """(sequence, token) -> the (start, end) of every partial that reaches its output."""
    partials = {w[1]: (w[6], w[7]) for w in listed if w[0] == PARTIAL}
    needs = {w[1]: w[5 : 6 + w[2]] for w in listed if w[0] == REDUCTION}

    def below(uid):
        return [partials[uid]] if uid in partials else sum(map(below, needs[uid]), [])

    found = {}
    for words in listed:
        to_batch, to_token = words[2:4] if words[0] == PARTIAL else words[3:5]
        if to_batch >= 0:
            count = min(4, new_tokens - to_token) if words[0] == PARTIAL else 1
            for token in range(to_token, to_token + count):
                assert (to_batch, token) not in found, "written twice"
                found[to_batch, token] = below(words[1])
    return found


for name, (lengths, new_tokens) in SHAPES.items():
    plan, found = plans[name], stretches(instructions(plans[name]), new_tokens)
    assert len(found) == len(lengths) * new_tokens, name
    for (sequence, _), parts in found.items():
        ordered = sorted(part for part in parts if part[1] > part[0])
        edges = [0, *(end for _, end in ordered)]
        assert [start for start, _ in ordered] == edges[:-1], name
        assert edges[-1] == lengths[sequence], name
    ends = {event.uid: event.end for event in plan.timeline()}
    for words in instructions(plan):
        if words[0] == REDUCTION:
            assert ends[words[1]] > max(ends[uid] for uid in words[5 : 6 + words[2]]), name
    for processor in range(132):
        events = [event for event in plan.timeline() if event.processor == processor]
        assert all(a.end <= b.start for a, b in itertools.pairwise(events)), name
assert max(plan.makespan for plan in plans.values()) == plans["B132-s4096-n4"].makespan

# %% [markdown]
# ## Executing one
#
# The table, instruction by instruction in NumPy and float64, against dense attention, and
# `mla_decode` on both of its backends against the same.

# %%
lengths, new_tokens, heads, page = [900, 70], 2, 16, 256
plan = megakernel.schedule(lengths, new_tokens, num_processors=6)
table = np.array([[3, 0, 5, 1], [2, 9, 9, 9]], np.int32)
q = rng.standard_normal((2, new_tokens, heads, 576)).astype(np.float32)  # rope | latent
pool = rng.standard_normal((6, page, 576)).astype(np.float32)
SCALE = 192**-0.5


def state(queries, keys):
    """(normalised output, base-2 log-sum-exp); nothing seen is (0, −∞)."""
    if len(keys) == 0:
        return np.zeros((heads, 512)), np.full(heads, -np.inf)
    scores = queries @ keys.T * SCALE / np.log(2)
    top = scores.max(axis=-1)
    powers = np.exp2(scores - top[:, None])
    return powers @ keys[:, 64:] / powers.sum(axis=-1)[:, None], np.log2(powers.sum(axis=-1)) + top


def merge(a, b):
    weight = 1 / (1 + np.exp2(b[1] - a[1]))[:, None]
    return a[0] * weight + b[0] * (1 - weight), np.logaddexp2(a[1], b[1])


def execute(plan):
    keys = [pool[ids[: -(-n // page)]].reshape(-1, 576).astype(np.float64)
            for ids, n in zip(table, lengths, strict=True)]  # fmt: skip
    out, scratch = np.full((2, new_tokens, heads, 512), np.nan), {}

    def write(to_batch, token, value):
        if to_batch >= 0:
            out[to_batch, token] = value[0]
        else:
            scratch[-to_batch - 1, token] = value

    waiting = instructions(plan)
    while waiting:
        words = waiting.pop(0)
        if words[0] == PARTIAL:
            _, _, to_batch, to_token, sequence, first, start, end, length = words[:9]
            for w in range(min(4, new_tokens - first)):
                seen = min(end, length - (new_tokens - first - w - 1))
                write(
                    to_batch,
                    to_token + w,
                    state(q[sequence, first + w], keys[sequence][start:seen]),
                )
        else:
            needs = [(uid, words[4]) for uid in words[5 : 6 + words[2]]]
            if not all(need in scratch for need in needs):
                waiting.append(words)  # its producers first
                continue
            merged = scratch[needs[0]]
            for need in needs[1:]:
                merged = merge(merged, scratch[need])
            write(words[3], words[4], merged)
    return out


exact = np.empty((2, new_tokens, heads, 512))
for b, n in enumerate(lengths):
    tokens = pool[table[b, : -(-n // page)]].reshape(-1, 576)[:n].astype(np.float64)
    for t in range(new_tokens):
        exact[b, t] = state(q[b, t], tokens[: n - new_tokens + 1 + t])[0]

results = {"the table in NumPy": (execute(plan), 1e-12)}
parts = [jnp.asarray(x) for x in (q[..., :64], q[..., 64:], pool[..., :64], pool[..., 64:])]
for backend in ("reference", "triton"):
    out = megakernel.mla_decode(
        plan, *parts, jnp.asarray(table), SCALE, backend=backend, interpret=backend == "triton"
    )
    results[f"mla_decode, {backend}"] = out, 2e-5
for name, (out, limit) in results.items():
    error = np.abs(np.asarray(out) - exact).max()
    print(f"{name:22} deviates by {error:.1e}")
    assert error < limit, name

# %% [markdown]
# ## Quality
#
# A tree of reductions is kept if `get_quality` is higher: how late, before the end, the earliest
# partial may start. Here it is once more, from the scheduler's description, in float32.


# %%
def quality(next_times, processors, tokens, length):
    f = np.float32
    steps = (length + 31) // 32
    if len(next_times) > processors:
        return -999999999.0
    times = sorted(map(f, next_times), reverse=True)
    part = []
    for i in range(processors):
        times[i % len(times)] -= f(0.4)
        part.append(times[i % len(times)])
    part.sort()
    for j, moment in enumerate(times):
        for k in range(tokens):
            if tokens * j + k < processors:
                part[tokens * j + k] = moment + f(1) - f(2)
    part.sort(reverse=True)
    least = part[-1]
    for i in range(processors):
        if steps <= 0:
            break
        take = min(steps, int(np.floor((part[i] - least) / f(1.49) + f(0.5))))
        steps -= take
        part[i] -= f(take) * f(1.49)
        if take > 0:
            part[i] -= f(7.5)
    full, rest = divmod(steps, processors)
    part.sort(reverse=True)
    return float(min(p - f(1.49) * f(full + (i < rest)) for i, p in enumerate(part)))


golden = {
    ((100, 95, 90, 85), 4, 8, 1024): 86.68,
    ((-2.5,), 1, 1, 32): -5.39,
    ((-2.5,), 4, 4, 1024): -17.02,
    ((-2.9, -5), 4, 4, 1024): -16.62,
}
for arguments, value in golden.items():
    assert round(megakernel.get_quality(*arguments), 2) == value
    assert round(quality(*arguments), 2) == value
for _ in range(300):
    times = np.sort(-rng.uniform(2, 30, rng.integers(1, 8))).astype(np.float32)[::-1].tolist()
    arguments = (
        times,
        int(rng.integers(8, 133)),
        int(rng.integers(1, 5)),
        int(rng.integers(1, 9000)),
    )
    assert abs(megakernel.get_quality(*arguments) - quality(*arguments)) < 2e-3, arguments

_, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
processors = np.arange(1, 133)
for length in (1024, 8192, 65536):
    left.plot(processors, [quality([-2.5], p, 1, length) for p in processors], label=f"{length:,}")
    spans = [megakernel.schedule([length], 1, p).makespan for p in processors[::6]]
    right.semilogy(processors[::6], spans, marker=".", label=f"{length:,} keys")
left.set(xlabel="processors", ylabel="quality of one reduction, µs", ylim=(-120, 0))
right.set(xlabel="processors", ylabel="makespan, µs")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Predicted and measured
#
# The model's makespan beside times that were measured for the same batches: of paged decode, which
# plans its splits on the device, and of the megakernel wherever a results file has them.

# %%
PAGED = {
    "four-s45118-n4": "long4-h16-q4",
    "B64-ragged-n4": "ragged64-h16-q4",
    "B132-s4096-n4": "B132-h16-s4096-q4",
    "B1-s65536-n1": "B1-h16-s65536",
}
predicted = {PAGED.get(name, name): plan.makespan for name, plan in plans.items()}
predicted |= {name: plan.makespan for name, plan in plans.items()}
measured = {}
for name in report.names():
    document = report.read(name)
    for row in document["rows"]:
        if row["shape"] in predicted and "ours_us" in row and not row.get("deterministic"):
            key = document["device"], row["op"], row.get("backend", "")
            measured.setdefault(key, {})[row["shape"]] = row["ours_us"]
_, axes = plt.subplots(figsize=(5, 4), layout="constrained")
for (device, op, backend), times in measured.items():
    points = [(predicted[shape], micros) for shape, micros in times.items()]
    axes.loglog(*zip(*points, strict=True), "o", label=f"{op}, {backend}, {device}")
    for shape, micros in times.items():
        print(f"{shape:20} {predicted[shape]:7.1f} µs predicted, {micros:7.1f} measured ({op})")
axes.loglog([10, 300], [10, 300], color="grey", linewidth=0.8)
axes.set(xlabel="makespan of the model (H100), µs", ylabel="measured, µs")
axes.legend(frameon=False, fontsize=7)
assert sum(map(len, measured.values())) >= len(PAGED)
plt.show()
