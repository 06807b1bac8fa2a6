# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # The shipped model: how it was trained, and that it is what was trained
#
# `mla-jax train-tiny` trains the preset `tiny` on Python's reference topics and docstrings and
# writes its loss curve beside the weights. This notebook draws the curve and measures the shipped
# weights again, on text of the Python that runs it.

# %%
import json
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from mla_jax import load_checkpoint
from mla_jax.corpus import build_corpus

TINY = Path(str(files("mla_jax") / "models" / "tiny"))
training = json.loads((TINY / "training.json").read_text())
curve, best = training["curve"], training["best"]
print(training["command"], "on", training["device"], "in", training["seconds"], "s")

# %%
steps = [point["step"] for point in curve]
_, axes = plt.subplots(figsize=(7, 3.5))
axes.plot(steps, [p["train_loss"] / np.log(2) for p in curve], label="training")
axes.plot(steps, [p["validation_bits_per_byte"] for p in curve], label="held out")
axes.plot(best["step"], best["validation_bits_per_byte"], "o", color="black", label="shipped")
axes.set(xlabel="step", ylabel="bits a byte", ylim=(0.5, 3))
axes.grid(alpha=0.3)
axes.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The weights that were kept are those of the lowest loss on text held out.

# %%
assert best["validation_loss"] == min(point["validation_loss"] for point in curve)

# %% [markdown]
# ## The shipped weights, measured here
#
# Random windows of this Python's own text; most of it the model has seen. The same bytes in random
# order have the same letters and no English: a model that reads must tell them apart.

# %%
model = load_checkpoint(TINY, dtype="float32")
text = np.frombuffer(build_corpus(), np.uint8)
rng = np.random.default_rng()
starts = rng.integers(0, len(text) - 257, 16)
windows = np.stack([text[s : s + 257] for s in starts]).astype(np.int32)


@jax.jit
def bits_per_byte(model, windows):
    logits = model(windows[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
    return -chosen.mean() / jnp.log(2.0)


read = float(bits_per_byte(model, jnp.asarray(windows)))
shuffled = float(bits_per_byte(model, jnp.asarray(rng.permuted(windows, axis=1))))
print(f"{read:.2f} bits a byte of text, {shuffled:.2f} of the same bytes shuffled")

# %%
assert read < best["validation_bits_per_byte"] + 0.4
assert shuffled > read + 2
