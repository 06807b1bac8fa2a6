# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # What was measured
#
# Every number below is read from `mla_jax/bench/results/*.json`, which `mla-jax bench` writes; none
# is typed by hand. Before anything is drawn, the files' derived numbers are computed again here,
# from shapes and times alone.

# %%
import re

import matplotlib.pyplot as plt
import numpy as np

from mla_jax.bench import report
from mla_jax.bench.paged import SHAPES

documents = {name: report.read(name) for name in report.names()}
assert documents, "no results file"
COLOURS = {"triton": "#0072B2", "mosaic_gpu": "#009E73", "reference": "#999999"}
for name, document in documents.items():
    ops = sorted({row["op"] for row in document["rows"]})
    print(f"{name}: {len(document['rows'])} rows of {', '.join(ops)} on {document['device']}")

# %% [markdown]
# ## The files' own arithmetic
#
# Paged decode must read each cached token once (576 numbers) and each query, and write each output
# (512): bytes over time is its bandwidth. Two products a head, query token and cached token are its
# arithmetic. The floor is the slower of the two at the rates of plain operations in the same run.


# %%
def close(a, b):
    return abs(a / b - 1) < 1e-6


def paged_counts(name):
    """(bytes, operations) of a shape of the benchmark, in bfloat16."""
    shape = SHAPES[name]
    keys, rows = sum(shape.lengths), shape.heads * shape.tokens
    queries = rows * len(shape.lengths)
    return 2 * (keys * 576 + queries * (576 + 512)), 2 * keys * rows * (576 + 512)


def paged_rows(document):
    """Rows of the paged benchmark whose arrays are bfloat16 throughout."""
    wanted = {"times_floor", "of_matmul", "ratio"}
    return [
        row
        for row in document["rows"]
        if row["op"] == "paged_decode" and wanted <= row.keys() and row["shape"] in SHAPES
        and row["dtype"] == "bfloat16" and row.get("kv_dtype", "bfloat16") == "bfloat16"
    ]  # fmt: skip


paged = {name: paged_rows(document) for name, document in documents.items()}
paged = {name: rows for name, rows in paged.items() if rows}
assert paged, "no results of paged decode"
for name, rows in paged.items():
    ceilings = documents[name]["ceilings"]
    for row in rows:
        moved, flops = paged_counts(row["shape"])
        micros = row["ours_us"]
        assert close(row["gb_s"], moved / micros / 1e3), row
        assert close(row["tflop_s"], flops / micros / 1e6), row
        floor = max(
            moved / ceilings["bandwidth_gb_s"] / 1e3, flops / ceilings["matmul_tflop_s"] / 1e6
        )
        assert close(row["times_floor"], micros / floor), row
        # Nothing is faster than the device, but the rates were measured at another moment.
        assert row["times_floor"] > 0.9, row
    for peer, mean in documents[name].get("geometric_means", {}).items():
        ratios = [row["peer_us"] / row["ours_us"] for row in documents[name]["rows"]
                  if row.get("peer") == peer]  # fmt: skip
        assert close(mean, np.exp(np.mean(np.log(ratios)))), (name, peer)

# %% [markdown]
# ## Roofline of paged decode
#
# A point is a shape: its arithmetic for each byte, and the rate reached. The roof is bandwidth to
# the left of the ridge and the matrix rate to the right.

# %%
_, panels = plt.subplots(
    1, len(paged), figsize=(6.5 * len(paged), 4), layout="constrained", squeeze=False
)
for axes, (name, rows) in zip(panels[0], paged.items(), strict=True):
    ceilings = documents[name]["ceilings"]
    grid = np.geomspace(10, 1000, 100)
    roof = np.minimum(grid * ceilings["bandwidth_gb_s"] / 1e3, ceilings["matmul_tflop_s"])
    axes.loglog(grid, roof, color="grey")
    for row in rows:
        moved, flops = paged_counts(row["shape"])
        colour = COLOURS.get(row["backend"], "black")
        axes.plot(flops / moved, row["tflop_s"], "o", color=colour, label=row["backend"])
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s")
    axes.set_title(f"{name}, {documents[name]['device']}", fontsize=9)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named.keys(), frameon=False)
plt.show()

# %% [markdown]
# ## Beside the peers
#
# The peer's time over ours, both in turns within one process: above 1 ours is faster.

# %%
ratios = {}
for name, document in documents.items():
    for row in document["rows"]:
        if "ratio" in row:
            assert close(row["ratio"], row["peer_us"] / row["ours_us"]), row
            key = f"{row['op']}, {row['peer']} ({name})"
            ratios.setdefault(key, {})[row["shape"]] = row["ratio"]
for key, values in ratios.items():
    _, axes = plt.subplots(figsize=(7, 0.2 * len(values) + 1), layout="constrained")
    axes.barh(range(len(values)), values.values(), color="#0072B2")
    axes.set_yticks(range(len(values)), values, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    if max(values.values()) > 4:
        axes.set_xscale("log")
    axes.set_title(key, fontsize=9)
    plt.show()

# %% [markdown]
# ## Whole decode steps
#
# A step's floor is every weight and the cache once, at the bandwidth of the same run.

# %%
steps = {name: [row for row in document["rows"] if row["op"] == "decode_step"]
         for name, document in documents.items()}  # fmt: skip
for name, rows in steps.items():
    for row in rows:
        batch = int(re.match(r"B(\d+) ", row["shape"])[1])
        assert close(row["tokens_s"], batch / row["ms_a_step"] * 1e3), row
        bandwidth = documents[name]["ceilings"]["bandwidth_gb_s"]
        assert close(row["floor_ms"], row["gigabytes_a_step"] / bandwidth * 1e3), row
        assert close(row["times_floor"], row["ms_a_step"] / row["floor_ms"]), row
    if rows:
        _, axes = plt.subplots(figsize=(5, 3), layout="constrained")
        places = np.arange(len(rows))
        axes.bar(places - 0.2, [row["floor_ms"] for row in rows], 0.38, label="floor")
        axes.bar(places + 0.2, [row["ms_a_step"] for row in rows], 0.38, label="measured")
        axes.set_xticks(places, [row["shape"] for row in rows])
        axes.set(ylabel="ms a step", title=f"{name}, {documents[name].get('preset', '')}")
        axes.legend(frameon=False)
        plt.show()
