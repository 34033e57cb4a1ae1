"""Shape of a decoder-only transformer: what it stores, what an iteration reads, what a token computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import model_validator

from rlgov.simulation.part import Count, GrownPart, NonNegative, Part, Positive

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Above this, most contexts of conversations fit into the window: its layers then read like the others.
SHORT_WINDOW_TOKENS = 512

Arithmetic = Literal["bf16", "fp8", "fp4"]
"""Number format in which the matrix units multiply; weights of fewer bits may be widened first."""


class Experts(GrownPart):
    """Routed experts of a mixture of experts. Shared ones count as dense weights: every token uses them."""

    count: Count  # routed experts of one layer
    per_token: Count  # of them, chosen for each token
    parameters: Positive  # of all routed experts in all layers
    bytes_per_weight: Positive
    evenness: Positive | None = None  # shape of their gamma distributed popularity; None: all alike

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.per_token > self.count:
            msg = f"per_token {self.per_token} is more than the {self.count} experts there are"
            raise ValueError(msg)
        return self

    def coverage(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of the experts that at least one of so many tokens chose, were all choices independent."""
        chosen = self.per_token / self.count
        if self.evenness is None:
            return np.asarray(1.0 - (1.0 - chosen) ** tokens, dtype=np.float64)
        # Choices of an expert are Poisson with a gamma distributed rate: none with this probability.
        missed = (1.0 + chosen * tokens / self.evenness) ** -self.evenness
        return np.asarray(1.0 - missed, dtype=np.float64)


class LatentAttention(Part):
    """Multi-head latent attention: the cache holds one compressed vector for all heads of a layer."""

    kv_lora_rank: Count
    qk_rope_head_dim: Count
    qk_nope_head_dim: Count
    v_head_dim: Count


class Window(Part):
    """Layers whose attention reaches back only so far."""

    tokens: Count
    layers: Count


class WeightGroup(Part):
    """Dense weights of another width than ``bytes_per_weight``: what quantisation leaves alone."""

    name: str
    parameters: Positive
    bytes_per_weight: Positive
    lookup: bool = False  # an input embedding: stored, but not read as a matrix


class Model(GrownPart):
    """Shape of a decoder-only transformer, dense or a mixture of experts."""

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    parameters: Positive  # all of them, experts included
    lookup_parameters: NonNegative  # of the input embedding: stored, but not read as a matrix
    bytes_per_weight: Positive  # of dense weights outside ``other_weights``
    bytes_per_kv_value: Positive
    source: str
    experts: Experts | None = None
    latent_attention: LatentAttention | None = None
    window: Window | None = None
    other_weights: tuple[WeightGroup, ...] = ()
    arithmetic: Arithmetic = "bf16"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.window is not None and self.window.layers > self.layers:
            msg = f"window.layers {self.window.layers} is more than the {self.layers} layers there are"
            raise ValueError(msg)
        experts = 0.0 if self.experts is None else self.experts.parameters
        others = sum(group.parameters for group in self.other_weights)
        if max(experts + self.lookup_parameters, experts + others) > self.parameters:
            msg = f"its parts have more weights than the {self.parameters:.4g} parameters of the whole"
            raise ValueError(msg)
        if sum(g.parameters for g in self.other_weights if g.lookup) > self.lookup_parameters:
            msg = "other_weights hold more embedding weights than lookup_parameters"
            raise ValueError(msg)
        return self

    @property
    def full_layers(self) -> int:
        """Layers whose cache and attention grow with the whole context."""
        short = self.window is not None and self.window.tokens <= SHORT_WINDOW_TOKENS
        return self.layers - self.window.layers if short and self.window is not None else self.layers

    @property
    def kv_bytes_per_token_of_layer(self) -> float:
        """What one layer caches of one token."""
        if self.latent_attention is not None:
            latent = self.latent_attention
            return (latent.kv_lora_rank + latent.qk_rope_head_dim) * self.bytes_per_kv_value
        return 2.0 * self.kv_heads * self.head_dim * self.bytes_per_kv_value

    @property
    def kv_bytes_per_token(self) -> float:
        """What a context grows by with each token, in all layers; layers of a short window do not grow."""
        return self.full_layers * self.kv_bytes_per_token_of_layer

    @property
    def window_kv_bytes(self) -> float:
        """What a sequence caches in layers of a short window, whatever its length."""
        if self.window is None or self.full_layers == self.layers:
            return 0.0
        return self.window.layers * self.window.tokens * self.kv_bytes_per_token_of_layer

    def kv_copies(self, tp_degree: int) -> float:
        """How often a TP group holds each cached value: heads cannot be split, a latent vector is in all."""
        heads = 1 if self.latent_attention is not None else self.kv_heads
        return max(1.0, tp_degree / heads)

    @property
    def weight_bytes(self) -> float:
        """Of the whole model, as it lies in memory."""
        stored = self.parameters * self.bytes_per_weight
        if self.experts is not None:
            stored += self.experts.parameters * (self.experts.bytes_per_weight - self.bytes_per_weight)
        return stored + sum(
            g.parameters * (g.bytes_per_weight - self.bytes_per_weight) for g in self.other_weights
        )

    @property
    def matrix_parameters(self) -> float:
        """Weights that some token multiplies: all but the input embedding."""
        return self.parameters - self.lookup_parameters

    @property
    def active_parameters(self) -> float:
        """Weights that each token multiplies: of the experts only those chosen for it."""
        if self.experts is None:
            return self.matrix_parameters
        idle = 1.0 - self.experts.per_token / self.experts.count
        return self.matrix_parameters - self.experts.parameters * idle

    @property
    def expert_bytes(self) -> float:
        """Of all routed experts; 0 for a dense model."""
        return 0.0 if self.experts is None else self.experts.parameters * self.experts.bytes_per_weight

    @property
    def dense_read_bytes(self) -> float:
        """Of the weights that every iteration reads, whatever its tokens."""
        read = self.matrix_parameters * self.bytes_per_weight
        if self.experts is not None:
            read -= self.experts.parameters * self.bytes_per_weight
        return read + sum(
            g.parameters * (g.bytes_per_weight - self.bytes_per_weight)
            for g in self.other_weights
            if not g.lookup
        )

    def weights_read_bytes(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights that an iteration of so many decoding sequences reads.

        Batch 0 stands for an iteration that only prefills: its many tokens touch every expert.
        """
        read = np.full_like(batch, self.dense_read_bytes)
        if self.experts is not None:
            touched = np.where(batch > 0, self.experts.coverage(batch), 1.0)
            read += self.expert_bytes * touched
        return read

    @property
    def attention_flop_per_pair(self) -> float:
        """FLOP of one prefilled query attending to one key, in all layers: QK and AV."""
        if self.latent_attention is not None:
            latent = self.latent_attention
            width = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
            return 2.0 * self.layers * self.heads * width
        return 4.0 * self.full_layers * self.heads * self.head_dim
