"""Model shapes and rules, as frozen dataclasses that validate themselves.

Symbols, as the papers and checkpoints name them: `dim` hidden size, `n_heads` query heads,
`kv_lora_rank` latent width, `qk_nope_head_dim` / `qk_rope_head_dim` the two parts of a query and
key head, `v_head_dim` a value head.
"""

import dataclasses
import math
from typing import Literal

from mla_jax._hf_config import format_hf, parse_hf

DTYPES = ("float32", "bfloat16", "float16")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{name}: got {value!r}, expected a positive integer",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv:2309.00071), with the attention temperature DeepSeek adds.

    With g(m) = 0.1 * m * ln(factor) + 1, the softmax scale is multiplied by `softmax_factor` =
    g(mscale_all_dim)^2, or 1 if that key is zero. cos and sin are multiplied by
    `rotation_factor`: `attention_factor` if given, else g(mscale) / g(mscale_all_dim) if both are
    non-zero, else g(1). DeepSeek's own code is the case mscale == mscale_all_dim.

    >>> round(YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0).softmax_factor, 4)
    1.8739
    """

    factor: float
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"yarn factor: got {self.factor}, expected at least 1")
        _require_positive(self, "original_max_position")
        _require(
            self.beta_fast >= self.beta_slow > 0,
            f"yarn betas: got {self.beta_fast=}, {self.beta_slow=}, expected fast >= slow > 0",
        )

    def _gain(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def softmax_factor(self) -> float:
        return self._gain(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def rotation_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._gain(self.mscale) / self._gain(self.mscale_all_dim)
        return self._gain(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """One Multi-head Latent Attention layer (DeepSeek-V2, arXiv:2405.04434).

    `q_lora_rank` 0 means a direct query projection. `rope_interleave` True rotates the pairs
    (x[2i], x[2i+1]), False the halves (x[i], x[i + R/2]). `index_n_heads` (0: none),
    `index_head_dim` and `index_topk` are the sizes of an `nn.Indexer`, which chooses for each token
    those that it attends to (DeepSeek-V3.2, arXiv:2512.02556).
    Errors: ValueError, naming the field.

    >>> MLAConfig(dim=64, n_heads=4, kv_lora_rank=32).qk_head_dim
    192
    """

    dim: int
    n_heads: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: YarnConfig | None = None
    index_n_heads: int = 0
    index_head_dim: int = 128
    index_topk: int = 2048
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("dim", "n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
            "v_head_dim",
        )
        _require(
            isinstance(self.q_lora_rank, int) and self.q_lora_rank >= 0,
            f"q_lora_rank: got {self.q_lora_rank!r}, expected 0 (no query compression) or more",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim: got {self.qk_rope_head_dim}, expected an even number",
        )
        _require(self.rope_theta > 1, f"rope_theta: got {self.rope_theta}, expected more than 1")
        _require(self.dtype in DTYPES, f"dtype: got {self.dtype!r}, expected one of {DTYPES}")
        _require(
            isinstance(self.index_n_heads, int) and self.index_n_heads >= 0,
            f"index_n_heads: got {self.index_n_heads!r}, expected 0 (no indexer) or more",
        )
        if self.index_n_heads:
            self._check_indexer()

    def _check_indexer(self) -> None:
        _require_positive(self, "index_head_dim", "index_topk")
        width = self.index_head_dim
        _require(
            width & (width - 1) == 0 and self.qk_rope_head_dim <= width <= 128,
            f"index_head_dim: got {width}, expected a power of two from "
            f"{self.qk_rope_head_dim=} to 128",
        )
        _require(
            self.index_topk % 64 == 0 and self.index_topk <= 2048,
            f"index_topk: got {self.index_topk}, expected a multiple of 64 up to 2048",
        )
        _require(
            self.q_lora_rank > 0,
            f"q_lora_rank: got {self.q_lora_rank} with an indexer, expected a positive integer",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-1/2, times YaRN's temperature when YaRN is on."""
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_factor if self.yarn else 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed and shared experts, and the rule that chooses among them (in float32).

    `score` "softmax" (V2): group score = its best expert. "sigmoid" (V3): experts are chosen by
    score + a learned bias, group score = the sum of its two best, the weights are the unbiased
    scores. `normalize` divides the chosen weights by their sum; then both times `route_scale`.

    >>> MoEConfig(n_routed=8, n_active=2, inter_dim=32, n_groups=4).n_limited_groups
    1
    """

    n_routed: int
    n_active: int
    inter_dim: int
    n_shared: int = 0
    n_groups: int = 1
    n_limited_groups: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    route_scale: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "n_routed", "n_active", "inter_dim", "n_groups", "n_limited_groups")
        _require(self.n_shared >= 0, f"n_shared: got {self.n_shared}, expected 0 or more")
        _require(
            self.score in ("softmax", "sigmoid"),
            f"score: got {self.score!r}, expected 'softmax' or 'sigmoid'",
        )
        _require(
            self.n_routed % self.n_groups == 0,
            f"n_groups: got {self.n_groups}, expected a divisor of {self.n_routed=}",
        )
        _require(
            self.n_limited_groups <= self.n_groups,
            f"n_limited_groups: got {self.n_limited_groups}, expected at most {self.n_groups=}",
        )
        reachable = self.n_routed // self.n_groups * self.n_limited_groups
        _require(
            self.n_active <= reachable,
            f"n_active: got {self.n_active}, expected at most {reachable}, the experts of "
            f"{self.n_limited_groups} of {self.n_groups} groups",
        )
        _require(
            self.score == "softmax" or self.n_routed // self.n_groups >= 2,
            f"n_groups: got {self.n_groups} for {self.n_routed} experts; sigmoid routing scores a "
            "group by its two best, so a group needs two experts",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-style decoder: `n_layers` of MLA and feed-forward, the first `n_dense` dense.

    `eos_ids` are the tokens that end a sequence; empty: none does. `moe` None: every layer is
    dense. Errors: ValueError, naming the field.

    >>> config = ModelConfig(vocab=256, n_layers=2, inter_dim=96, mla=MLAConfig(dim=64, n_heads=4))
    >>> config.dtype, config.is_moe(1)
    ('bfloat16', False)
    """

    vocab: int
    n_layers: int
    inter_dim: int
    mla: MLAConfig
    moe: MoEConfig | None = None
    n_dense: int = 0
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(self, "vocab", "n_layers", "inter_dim", "max_seq_len")
        _require(
            0 <= self.n_dense <= self.n_layers,
            f"n_dense: got {self.n_dense}, expected 0 to {self.n_layers=}",
        )
        _require(self.norm_eps > 0, f"norm_eps: got {self.norm_eps}, expected more than 0")
        ids = (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,)))
        for token in ids:
            _require(
                0 <= token < self.vocab,
                f"bos_id/eos_ids: got {token}, expected a token below {self.vocab=}",
            )

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.n_dense

    @property
    def dtype(self) -> str:
        return self.mla.dtype

    def replace_dtype(self, dtype: str) -> "ModelConfig":
        """The same model with parameters and activations in `dtype`."""
        return dataclasses.replace(self, mla=dataclasses.replace(self.mla, dtype=dtype))

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Read a Hugging Face `config.json`: `deepseek_v2`, `deepseek_v3` or `deepseek_v32`.

        Errors: ValueError naming the key that is missing or whose value is not supported.
        """
        values = parse_hf(config)
        rope, moe = values.pop("yarn"), values.pop("moe")
        yarn = YarnConfig(**rope) if rope else None
        return cls(
            mla=MLAConfig(yarn=yarn, **values.pop("mla")),
            moe=MoEConfig(**moe) if moe else None,
            **values,
        )

    def to_hf(self) -> dict:
        """The Hugging Face `config.json` of this model.

        Its model type is `deepseek_v32` with an indexer, else `deepseek_v2` if its routing is
        softmax, else `deepseek_v3`. Errors: ValueError for what that model type cannot say.

        >>> ModelConfig.from_hf(presets["tiny"].to_hf()) == presets["tiny"]
        True
        """
        return format_hf(self)


def _deepseek_yarn(mscale: float) -> YarnConfig:
    return YarnConfig(factor=40.0, mscale=mscale, mscale_all_dim=mscale)


presets: dict[str, ModelConfig] = {
    # The architecture of the shipped byte-level model: 2.0 M parameters, so that its bfloat16
    # checkpoint stays below 4 MB. Token 0 begins and ends a text.
    "tiny": ModelConfig(
        vocab=256,
        n_layers=4,
        inter_dim=512,
        n_dense=1,
        max_seq_len=2048,
        bos_id=0,
        eos_ids=(0,),
        mla=MLAConfig(
            dim=192,
            n_heads=8,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            dtype="float32",
        ),
        moe=MoEConfig(
            n_routed=4,
            n_active=2,
            inter_dim=112,
            n_shared=1,
            score="sigmoid",
            normalize=True,
        ),
    ),
    "deepseek-v2-lite": ModelConfig(
        vocab=102400,
        n_layers=27,
        inter_dim=10944,
        n_dense=1,
        max_seq_len=163840,
        bos_id=100000,
        eos_ids=(100001,),
        mla=MLAConfig(dim=2048, n_heads=16, yarn=_deepseek_yarn(0.707)),
        moe=MoEConfig(n_routed=64, n_active=6, inter_dim=1408, n_shared=2),
    ),
    # mscale 1.0 as in DeepSeek's own code; the released Hugging Face config says 0.707, and
    # `from_hf` follows what it reads.
    "deepseek-v2": ModelConfig(
        vocab=102400,
        n_layers=60,
        inter_dim=12288,
        n_dense=1,
        max_seq_len=163840,
        bos_id=100000,
        eos_ids=(100001,),
        mla=MLAConfig(dim=5120, n_heads=128, q_lora_rank=1536, yarn=_deepseek_yarn(1.0)),
        moe=MoEConfig(
            n_routed=160,
            n_active=6,
            inter_dim=1536,
            n_shared=2,
            n_groups=8,
            n_limited_groups=3,
            route_scale=16.0,
        ),
    ),
    "deepseek-v3": ModelConfig(
        vocab=129280,
        n_layers=61,
        inter_dim=18432,
        n_dense=3,
        max_seq_len=163840,
        bos_id=0,
        eos_ids=(1,),
        mla=MLAConfig(dim=7168, n_heads=128, q_lora_rank=1536, yarn=_deepseek_yarn(1.0)),
        moe=MoEConfig(
            n_routed=256,
            n_active=8,
            inter_dim=2048,
            n_shared=1,
            n_groups=8,
            n_limited_groups=4,
            score="sigmoid",
            normalize=True,
            route_scale=2.5,
        ),
    ),
}
# The same sizes, and an indexer in every layer.
presets["deepseek-v3.2"] = dataclasses.replace(
    presets["deepseek-v3"], mla=dataclasses.replace(presets["deepseek-v3"].mla, index_n_heads=64)
)
