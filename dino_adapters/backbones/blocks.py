"""What a vision transformer is made of: attention, feed-forward, norms, gains, dropped rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_adapters.backbones.config import ViTConfig
from dino_adapters.backbones.draws import Draws
from dino_adapters.backbones.rope import Tables, rotate
from dino_adapters.contracts import UnknownNameError

WEIGHT_STD = 0.02
"""Standard deviation of linear weights and tokens at the start (arXiv 2508.10104)."""


def swiglu_width(embed_dim: int, ratio: float, align: int) -> int:
    """Hidden width of SwiGLU: two thirds of `ratio * embed_dim`, rounded up to `align`.

    The two thirds keep the weights of three matrices as many as those of an MLP's two.
    """
    width = int(embed_dim * ratio) * 2 // 3
    return -(-width // align) * align


def pick_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers as indices from 0, each once, in network order.

    Raises:
        UnknownNameError: an index outside -depth..depth-1.
    """
    for layer in layers:
        if not -depth <= layer < depth:
            raise UnknownNameError(
                f"Layer {layer} was asked for, but the network has {depth}. Give numbers from 0 to "
                f"{depth - 1}, or from -{depth} to -1 to count from the end."
            )
    return tuple(sorted({layer % depth for layer in layers}))


def keep_rows(count: int, rate: float, draws: Draws, device: torch.device) -> Tensor:
    """The rows of a batch that a branch runs on (DINOv2's stochastic depth, arXiv 2304.07193).

    Args:
        count: b, rows of the batch.
        rate: Share of rows that is left out; the kept number is rounded down, but at least 1.
        draws: Asked for one permutation of b.
        device: Of the result.

    Returns:
        int64 `(max(floor(b * (1 - rate)), 1),)`.
    """
    return draws.permutation(count, device=device)[: max(int(count * (1 - rate)), 1)]


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor:
    """`x` plus a branch that ran on some rows only, scaled up so that its mean is unchanged.

    Args:
        x: `(b, ...)`.
        branch: Maps `(k, ...)` to the same shape.
        rows: int64 `(k,)`, or None for all rows.
    """
    if rows is None:
        return x + branch(x)
    added = branch(x.index_select(0, rows)).to(x.dtype)
    return x.index_add(0, rows, added, alpha=len(x) / len(rows))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight`, in fp32 or better (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def reset_parameters(self) -> None:
        """All ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


def make_norm(config: ViTConfig) -> nn.Module:
    """The norm that the config names."""
    make = RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return make(config.embed_dim, eps=config.norm_eps)


class LayerScale(nn.Module):
    """A learned gain per channel on a branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def reset_parameters(self) -> None:
        """All at the start value."""
        nn.init.constant_(self.gamma, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """`x * gamma`."""
        return x * self.gamma


class KeyMaskedLinear(nn.Linear):
    """The fused q, k, v map, with its bias multiplied by a mask that is 0 for k.

    The mask is a buffer of the state dict because released files differ in it: several hold only
    zeros, which switches the biases of q and v off too.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("bias_mask", torch.empty(out_features))
        self.reset_mask()

    @torch.no_grad()
    def reset_mask(self) -> None:
        """1 for q, 0 for k, 1 for v."""
        self.bias_mask.fill_(1.0)
        self.bias_mask.chunk(3)[1].zero_()

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias * bias_mask`."""
        return F.linear(input, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions where it is given tables of them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        if config.qkv_bias and config.mask_k_bias:
            self.qkv = KeyMaskedLinear(dim, 3 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)

    def _heads(self, x: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, rotated k, and v, each `(B, heads, T, d)`."""
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if tables is None:
            return q, k, v
        return rotate(q, tables), rotate(k, tables), v

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        """Attention of all tokens to all tokens.

        Args:
            x: `(B, T, D)`, T = prefix + N.
            tables: Rotations of the N patches; None rotates nothing.

        Returns:
            `(B, T, D)`.
        """
        mixed = F.scaled_dot_product_attention(*self._heads(x, tables))
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def cls_weights(self, x: Tensor, tables: Tables | None) -> Tensor:
        """How the first token spreads its attention.

        Args:
            x: `(B, T, D)`, T = prefix + N.
            tables: Rotations of the N patches; None rotates nothing.

        Returns:
            `(B, heads, T)`; a row sums to 1.
        """
        q, k, _ = self._heads(x, tables)
        scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
        return scores.softmax(-1)[:, :, 0]


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.ffn_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden, bias=config.ffn_bias)
        self.fc2 = nn.Linear(hidden, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """`w3(silu(w1 x) * w2 x)` (arXiv 2002.05202)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = swiglu_width(config.embed_dim, config.ffn_ratio, config.swiglu_align)
        self.w1 = nn.Linear(config.embed_dim, hidden, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.embed_dim, hidden, bias=config.ffn_bias)
        self.w3 = nn.Linear(hidden, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added back with its gain."""

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config) if config.ffn == "swiglu" else MLP(config)
        # Official configs write 0 or nothing for "no gain"; a gain that starts at 0 would be dead.
        self.ls1, self.ls2 = (
            LayerScale(config.embed_dim, config.layerscale) if config.layerscale else nn.Identity()
            for _ in range(2)
        )

    def forward(
        self, groups: Sequence[Tensor], tables: Sequence[Tables | None], draws: Draws
    ) -> list[Tensor]:
        """One block over all groups of crops.

        Args:
            groups: `(b_i, T_i, D)` each.
            tables: Rotations of each group's patches; None where positions are learned.
            draws: Asked for a permutation per group for attention, then per group for the
                feed-forward, in train mode with `drop_path` above 0.

        Returns:
            As `groups`.
        """
        rows = self._rows(groups, draws)
        groups = [
            add_branch(x, lambda y, t=table: self.ls1(self.attn(self.norm1(y), t)), kept)
            for x, table, kept in zip(groups, tables, rows, strict=True)
        ]
        rows = self._rows(groups, draws)
        return [
            add_branch(x, lambda y: self.ls2(self.mlp(self.norm2(y))), kept)
            for x, kept in zip(groups, rows, strict=True)
        ]

    def _rows(self, groups: Sequence[Tensor], draws: Draws) -> list[Tensor | None]:
        if not self.training or self.drop_path == 0.0:
            return [None] * len(groups)
        return [keep_rows(len(x), self.drop_path, draws, x.device) for x in groups]
