"""Training a decoder on one text: AdamW, a few thousand steps, the best parameters kept.

A small model reads a small text many times over, so what limits it is overfitting: strong weight
decay, and the parameters with the lowest loss on held-out text are the result.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from mla_jax.config import ModelConfig
from mla_jax.nn import Decoder

if TYPE_CHECKING:
    import optax

HELD_OUT = 50
"""One window of the text in this many is held out for validation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long, on how much and how hard. Errors: ValueError naming the field.

    Each step reads `batch` windows of `length` bytes. The learning rate rises for `warmup` steps,
    or a tenth of all if that is less, and falls on a cosine to a hundredth. `balance_rate` moves
    the biases of sigmoid routers towards an even load (DeepSeek-V3, arXiv:2412.19437 §2.1.2).

    >>> TrainingSettings(steps=500).batch
    32
    """

    steps: int = 2500
    batch: int = 32
    length: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 2.0
    warmup: int = 200
    clip_norm: float = 1.0
    balance_rate: float = 1e-3
    evaluate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for names, least, expected in (
            (("steps", "batch", "length", "evaluate_every"), 1, "1 or more"),
            (("weight_decay", "warmup", "balance_rate", "seed"), 0, "0 or more"),
            (("learning_rate", "clip_norm"), math.ulp(0.0), "more than 0"),
        ):
            for name in names:
                value = getattr(self, name)
                if not least <= value < math.inf:
                    raise ValueError(f"{name}: got {value}, expected {expected}")


class Evaluation(NamedTuple):
    """A point of the loss curve, in nats a byte.

    `train_loss` is the mean since the point before; `expert_loads` the share of the held-out
    bytes' choices that each expert got, a row a routed layer.
    """

    step: int
    train_loss: float | None
    validation_loss: float
    expert_loads: list[list[float]]


class _State(NamedTuple):
    params: nnx.State
    biases: nnx.State
    optimizer: "optax.OptState"


class Training:
    """A training run that its caller drives, a few steps at a time.

    text: bytes, each a token below the vocabulary. Parameters and optimizer are float32; the
    forward pass computes in bfloat16, on a CPU in float32. Batches depend on the seed and the step
    alone, not on how the steps are cut into calls. Errors: ValueError (text too short, a byte
    outside the vocabulary, windows longer than the model's longest sequence, a loss that is no
    longer finite), ModuleNotFoundError (optax is missing).

    >>> from mla_jax import presets
    >>> settings = TrainingSettings(steps=2, batch=1, length=8)
    >>> training = Training(presets["tiny"], b"to be or not to be, " * 9, settings)
    >>> while not training.done:
    ...     training.advance(2)
    >>> training.best_model("bfloat16").embed.dtype
    dtype(bfloat16)
    """

    def __init__(self, config: ModelConfig, text: bytes, settings: TrainingSettings) -> None:
        if settings.length > config.max_seq_len:
            raise ValueError(
                f"length: got {settings.length}, expected at most {config.max_seq_len=}"
            )
        train, held_out = split_text(text, settings.length + 1)
        if max(text) >= config.vocab:
            raise ValueError(f"text: got byte {max(text)}, expected all below {config.vocab=}")
        self.config, self.settings = config, settings
        self.step = 0
        self.curve: list[Evaluation] = []
        self.best: Evaluation | None = None
        self._text, self._held_out = jnp.asarray(train), jnp.asarray(held_out)
        self._losses: list[tuple[Array, int]] = []

        self._optimizer = _adamw(settings)
        self._dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = Decoder(config.replace_dtype("float32"), rngs=nnx.Rngs(settings.seed))
        _, params, biases = nnx.split(model, nnx.Param, ...)
        self._state = _State(params, biases, self._optimizer.init(params))
        self._best_state: tuple[nnx.State, nnx.State] | None = None
        self._run = jax.jit(self._steps, donate_argnums=0)
        self._validate = jax.jit(self._validation_loss)

    @property
    def done(self) -> bool:
        return self.step >= self.settings.steps

    def advance(self, count: int) -> None:
        """Run `count` steps in one compiled call, or the fewer that lead to an evaluation."""
        every = self.settings.evaluate_every
        target = min(self.settings.steps, (self.step // every + 1) * every)
        count = min(count, target - self.step)
        span = jnp.array([self.step, self.step + count], jnp.int32)
        self._state, loss = self._run(self._state, span, self._text)
        self._losses.append((loss.block_until_ready(), count))
        self.step += count
        if self.step == target:
            self.evaluate()

    def evaluate(self) -> Evaluation:
        """The losses at this step, added to `curve`; the best step's parameters are kept."""
        if self.curve and self.curve[-1].step == self.step:
            return self.curve[-1]
        params, biases, _ = self._state
        loss, loads = self._validate(params, biases, self._held_out)
        count = sum(count for _, count in self._losses)
        evaluation = Evaluation(
            step=self.step,
            train_loss=sum(float(total) for total, _ in self._losses) / count if count else None,
            validation_loss=float(loss),
            expert_loads=[load.tolist() for load in loads],
        )
        if not math.isfinite(evaluation.validation_loss):
            raise ValueError(
                f"learning_rate: got {self.settings.learning_rate}, but by step {self.step} the "
                f"loss is {evaluation.validation_loss}; expected a lower rate"
            )
        self._losses.clear()
        self.curve.append(evaluation)
        if self.best is None or evaluation.validation_loss < self.best.validation_loss:
            self.best = evaluation
            # A copy: the next steps reuse the state's own buffers.
            self._best_state = jax.tree.map(jnp.copy, (params, biases))
        return evaluation

    def best_model(self, dtype: str) -> Decoder:
        """The model of the lowest validation loss so far, its parameters rounded to `dtype`."""
        if self._best_state is None:
            self.evaluate()
        assert self._best_state is not None
        return self._model(*self._best_state, dtype)

    def _steps(
        self, state: _State, span: Int[Array, "2"], text: UInt8[Array, " bytes"]
    ) -> tuple[_State, Float[Array, ""]]:
        """The state after the steps from span[0] to span[1], and the sum of their losses."""

        def step(index: Array, carry: tuple[_State, Array]) -> tuple[_State, Array]:
            state, total = carry
            (loss, loads), gradients = jax.value_and_grad(self._loss, has_aux=True)(
                state.params, state.biases, self._sample(index, text)
            )
            with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int32
                updates, optimizer = self._optimizer.update(
                    gradients, state.optimizer, state.params
                )
            params = jax.tree.map(jnp.add, state.params, updates)
            return _State(params, self._balanced(state.biases, loads), optimizer), total + loss

        return lax.fori_loop(span[0], span[1], step, (state, jnp.float32(0)))

    def _sample(self, step: Int[Array, ""], text: UInt8[Array, " bytes"]) -> Array:
        """Windows [batch, length + 1] that begin anywhere in the text."""
        settings, width = self.settings, self.settings.length + 1
        key = jax.random.fold_in(jax.random.key(settings.seed), step)
        starts = jax.random.randint(key, (settings.batch, 1), 0, text.size - width + 1)
        return text[starts + jnp.arange(width)]

    def _loss(
        self, params: nnx.State, biases: nnx.State, windows: UInt8[Array, "batch width"]
    ) -> tuple[Float[Array, ""], list[Array]]:
        """Mean cross-entropy of each byte after the first, and the experts' loads."""
        tokens = windows.astype(jnp.int32)
        model = self._model(params, biases, self._dtype)
        # Every method's result is recorded at trace time; what is not used is not computed.
        recorded: Any = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        logits, seen = recorded(tokens[:, :-1])
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        loss = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
        loads = []
        for layer in filter(self.config.is_moe, range(self.config.n_layers)):
            calls = seen["layers"][layer]["ffn"]["router"]["__call__"].get_value()
            expert_ids, _ = calls[0]
            loads.append(self._load(expert_ids))
        return loss, loads

    def _load(self, expert_ids: Int[Array, "tokens active"]) -> Float[Array, " experts"]:
        """The share of the tokens' choices that each expert got."""
        assert self.config.moe is not None
        counts = jnp.bincount(expert_ids.reshape(-1), length=self.config.moe.n_routed)
        return counts.astype(jnp.float32) / expert_ids.size

    def _balanced(self, biases: nnx.State, loads: list[Array]) -> nnx.State:
        """Biases a step up for the experts of less than the mean load, a step down for others."""
        leaves, structure = jax.tree.flatten(biases)
        rate = self.settings.balance_rate
        moved = [  # softmax routers have no bias, so nothing to move
            bias + rate * jnp.sign(load.mean() - load)
            for bias, load in zip(leaves, loads, strict=bool(leaves))
        ]
        return jax.tree.unflatten(structure, moved)

    def _validation_loss(
        self, params: nnx.State, biases: nnx.State, windows: UInt8[Array, "windows width"]
    ) -> tuple[Float[Array, ""], list[Array]]:
        each = lax.map(lambda window: self._loss(params, biases, window[None]), windows)
        return jax.tree.map(lambda x: x.mean(axis=0), each)

    def _model(self, params: nnx.State, biases: nnx.State, dtype: str) -> Decoder:
        config = self.config.replace_dtype(dtype)
        shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        rounded = jax.tree.map(lambda p: p.astype(dtype), params)
        return nnx.merge(nnx.graphdef(shapes), rounded, biases)


def split_text(text: bytes, width: int) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, "m w"]]:
    """(training text, held-out windows [m, width]): each HELD_OUT-th window, from the first.

    The training text is the rest, joined. Errors: ValueError if there are not two windows.
    """
    tokens = np.frombuffer(text, np.uint8)
    count = tokens.size // width
    if count < 2:
        raise ValueError(f"text: got {tokens.size} bytes, expected two windows of {width} or more")
    windows = tokens[: count * width].reshape(count, width)
    held = np.arange(count) % HELD_OUT == 0
    return np.concatenate([windows[~held].reshape(-1), tokens[count * width :]]), windows[held]


def _adamw(settings: TrainingSettings) -> "optax.GradientTransformation":
    """AdamW (arXiv:1711.05101) behind a clip of the gradients; only matrices decay."""
    try:
        import optax
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "optax: not installed, and training needs it; pip install 'mla-jax[train]'"
        ) from None
    peak = settings.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(settings.warmup, settings.steps // 10),
        decay_steps=settings.steps,
        end_value=peak / 100,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
