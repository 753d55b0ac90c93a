"""Rotary embedding tables: cosines and sines by position, grown in pieces as positions are met: a long context costs memory once used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig, Llama3Scaling

PIECE = 1024  # positions; a fixed size, so that a table's bits do not depend on how it grew


def inverse_frequencies(config: ArchConfig) -> Tensor:
    """[D / 2] fp32: how fast each pair of a head turns."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    is_long, is_short = turns < scaling.low_freq_factor, turns > scaling.high_freq_factor
    return torch.where(is_long, frequencies / scaling.factor, torch.where(is_short, frequencies, between))


class RotaryTable:
    """cos [P, 1, D], its halves equal, and sin [P, 1, D / 2], in one dtype."""

    def __init__(self, config: ArchConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config)
        self._dtype = dtype
        self._device = device
        self._cos = torch.empty(0, 1, config.head_dim, dtype=dtype, device=device)
        self._sin = torch.empty(0, 1, config.head_dim // 2, dtype=dtype, device=device)

    def at(self, positions: Tensor, max_position: int) -> tuple[Tensor, Tensor]:
        """Rows for positions [T] int64, none above `max_position`."""
        while self._cos.shape[0] <= max_position:
            self._grow()
        return self._cos[positions], self._sin[positions]

    def joined(self, num_positions: int) -> Tensor:
        """[P, D] for P positions or more, cosines then sines: what a GPU's kernel reads by position."""
        while self._cos.shape[0] < num_positions:
            self._grow()
        half = self._sin.shape[2]
        return torch.cat((self._cos[:, 0, :half], self._sin[:, 0]), dim=1)

    def _grow(self) -> None:
        start = self._cos.shape[0]
        angles = torch.arange(start, start + PIECE).float().unsqueeze(1) * self._frequencies
        cos, sin = (x.unsqueeze(1).to(self._device, self._dtype) for x in (angles.cos(), angles.sin()))
        self._cos = torch.cat((self._cos, torch.cat((cos, cos), dim=-1)))
        self._sin = torch.cat((self._sin, sin))
