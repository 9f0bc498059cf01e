"""What a router does with its logits, as data: how it scores, chooses and weighs experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How experts are scored, chosen and weighed; whether weights are normalised is `normalize_top_k`.

    Attributes:
        score: "softmax" or "sigmoid" over all experts; "top_k_softmax", of the K best logits alone;
            "sparsemixer", two experts, Phi-MoE's way (arXiv 2409.12136).
        logit_bias: whether the product with the router has a bias.
        selection_bias: whether a bias is added to the scores for choosing, though not for weighing
            (DeepSeek-V3, arXiv 2412.19437).
        float32_logits: whether the router is multiplied in float32 whatever the model's dtype.
        num_groups, groups_per_token: experts lie in so many groups, of which a token goes to so many; 1 and 1
            for no groups.
        group_score: a group counts by its best expert ("max") or by the sum of its two best ("two_best").
        epsilon: added to the sum of a token's weights before they are divided by it.
        smallest_sum: in its place: a smaller sum counts as this; 0 for none.
        scale: of the weights, in the end.
        jitter: of "sparsemixer": experts whose logits lie further below the best are not near it.
    """

    score: Literal["softmax", "sigmoid", "top_k_softmax", "sparsemixer"] = "softmax"
    logit_bias: bool = False
    selection_bias: bool = False
    float32_logits: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "two_best"] = "max"
    epsilon: float = 0.0
    smallest_sum: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01


SOFTMAX = RoutingRule()
"""What most families do: the softmax over all experts, and the K best."""
