"""LoRA (Hu et al., 2021) as a freeze policy: `mmv train sft --freeze lora` trains two narrow matrices per projection.

A frozen linear layer y = W x becomes y = W x + s B A x. A [r, in] starts as noise and B [out, r] as zeros, so that the
first step begins with the model as it was. What is saved is W + s B A under the published name.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minimind_v.core.config.freeze import FREEZE_POLICIES, FreezePolicy

RANK = 8
SCALE = 2.0  # the usual alpha / r
WRAPPED = ("q_proj", "v_proj")  # of every decoder layer; any nn.Linear of the model may stand here


class LoRALinear(nn.Linear):
    """The linear layer `base`, whose weight stays where it is, with a trainable matrix of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(self.weight.new_empty(RANK, self.in_features))  # [r, in]
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, RANK))  # [out, r]
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)  # [..., in] → [..., r] → [..., out]
        return super().forward(x) + SCALE * change

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The weight [out, in] that computes the same alone; where nothing was learned, the very same bits."""
        change = SCALE * (self.lora_b @ self.lora_a)
        return torch.where(change == 0, self.weight, self.weight + change)

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        """The layer under its published names: the merged weight and, if there is one, the bias."""
        destination[prefix + "weight"] = self.merged()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


def add_lora(model: nn.Module) -> None:
    """Replace the linear layers that are to be adapted."""
    for module in list(model.model.modules()):  # of the language model, not of the vision encoder
        for name in WRAPPED:
            if type(getattr(module, name, None)) is nn.Linear:
                setattr(module, name, LoRALinear(getattr(module, name)))


FREEZE_POLICIES["lora"] = FreezePolicy(trains=lambda name, layers: ".lora_" in name, prepare=add_lora)
