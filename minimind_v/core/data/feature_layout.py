"""The file layout of one image's features: exact, or 8 bits with a scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALE = 4  # bytes of a token's scale, a float32


@dataclass(frozen=True)
class FeatureLayout:
    """The layout of one image's features: P patches of a width; `kind` is float32, bfloat16 or int8."""

    kind: str
    patches: int
    width: int

    @property
    def record(self) -> int:
        """Bytes of one image."""
        if self.kind == "int8":
            return self.eighth
        return self.patches * self.width * TYPES[self.kind].itemsize

    @property
    def eighth(self) -> int:
        """Bytes of one image as int8, for every kind."""
        return self.patches * (self.width + SCALE)

    def pack(self, features: Tensor) -> list[bytes]:
        """[K, P, width] on the CPU → the bytes of each image."""
        if self.kind != "int8":
            rows = features.to(TYPES[self.kind]).contiguous().flatten(1).view(torch.uint8)  # [K, record]
            return [row.numpy().tobytes() for row in rows]
        levels, scales = _quantise(features)
        return [level.numpy().tobytes() + scale.numpy().tobytes() for level, scale in zip(levels, scales, strict=True)]

    def unpack(self, data: bytearray) -> Tensor:
        """The bytes of an image → [P, width]."""
        if self.kind != "int8":
            return torch.frombuffer(data, dtype=TYPES[self.kind]).view(self.patches, self.width)
        split = self.patches * self.width
        levels = torch.frombuffer(data, dtype=torch.int8, count=split).view(self.patches, self.width)
        scales = torch.frombuffer(data, dtype=torch.float32, offset=split).view(self.patches, 1)
        return levels.float() * scales

    def rounded(self, features: Tensor) -> Tensor:
        """Features with the precision of stored ones, on any device."""
        if self.kind != "int8":
            return features.to(TYPES[self.kind])
        levels, scales = _quantise(features)
        return levels.float() * scales


def _quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """[K, P, width] → levels from -127 to 127, int8 [K, P, width], and the size of a level, float32 [K, P, 1]."""
    scales = features.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return (features.float() / scales).round().to(torch.int8), scales
