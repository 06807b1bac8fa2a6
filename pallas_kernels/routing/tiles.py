"""The rule by which experts are chosen, and the shape of a routing problem."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """Softmax (DeepSeek-V2, arXiv:2405.04434) or sigmoid (V3, arXiv:2412.19437) routing.

    Experts come in `groups` equal groups, of which the best `limited_groups` are eligible; a
    group's score is its best expert's (softmax) or the sum of its two best (sigmoid). `active`
    experts are chosen by score plus bias; their weights are the scores without the bias, divided
    by their sum if `normalize`, times `scale`.
    """

    active: int
    groups: int = 1
    limited_groups: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0

    @property
    def best_of_group(self) -> int:
        """How many of a group's best experts make its score."""
        return 1 if self.score == "softmax" else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingProblem:
    """Everything static about a call."""

    tokens: int
    experts: int
    rule: RoutingRule
