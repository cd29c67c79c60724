"""The decoder as one compiled piece: norms, rotations, products of elements and sums become few kernels.

Inductor needs a minute or so for it. It must prove itself: what it computes is compared with the decoder itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from minimind_v.core.model.decoder import Decoder

CLOSE = 0.1  # of a tensor's norm. In bf16 a token may choose another expert at a tie; wrong kernels differ by far more.
SHAPES = ((2, 48), (3, 80))  # rows and lengths that are tried: more than one, so that neither becomes a constant


def compile_decoder(
    decoder: Decoder, precision: Callable[[], AbstractContextManager[object]], backend: str = "inductor"
) -> str | None:
    """Compile the passes of a decoder whose freeze policy was applied; returns why it was not, or None.

    `precision` gives the autocast of the run. A decoder that is not compiled is as it was. Random numbers stay.
    """
    batches = [_batch(decoder, *shape) for shape in SHAPES]
    try:
        # An earlier decoder may have let errors pass.
        with torch.enable_grad(), torch._dynamo.config.patch(suppress_errors=False):
            expected = [_passes(decoder, precision, batch) for batch in batches]
            _compile_training(decoder, backend)
            results = [_passes(decoder, precision, batch) for batch in batches]
        pairs = [pair for tensors in zip(results, expected, strict=True) for pair in zip(*tensors, strict=True)]
        reason = None if all(_is_close(*pair) for pair in pairs) else "it computes something else"
    except Exception as error:  # a compiler has errors of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if reason is None:
        torch._dynamo.config.suppress_errors = True  # later shapes, too, are computed as they are if they must be
    else:
        decoder._compiled_call_impl = None
        torch._dynamo.reset()
    return reason


def _compile_training(decoder: Decoder, backend: str) -> None:
    """Compile the passes with gradients alone: those of a measurement, with caches, would be compiled one by one."""
    decoder.compile(dynamic=True, backend=backend)
    compiled, plain = decoder._compiled_call_impl, decoder._call_impl
    assert compiled is not None
    decoder._compiled_call_impl = lambda *args: (compiled if torch.is_grad_enabled() else plain)(*args)


def _batch(decoder: Decoder, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, T, D], their attention mask [B, T], and the positions [S] that are read."""
    weight = decoder.embed_tokens.weight
    draw = torch.Generator().manual_seed(length)
    x = torch.randn(rows, length, decoder.config.hidden_size, generator=draw) * float(weight.detach().std())
    lengths = length - 3 * torch.arange(rows)
    mask = torch.arange(length) < lengths[:, None]
    positions = mask.flatten().nonzero()[1::3, 0]
    return x.to(weight.device).requires_grad_(), mask.to(weight.device), positions.to(weight.device)


def _passes(
    decoder: Decoder, precision: Callable[[], AbstractContextManager[object]], batch: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """The hidden states, and the gradients of the embeddings and of all weights that train."""
    x, mask, positions = batch
    inputs = [x, *(weight for weight in decoder.parameters() if weight.requires_grad)]
    with precision():
        hidden, aux_loss = decoder(x, mask, None, positions)
    gradients = torch.autograd.grad(hidden.float().square().mean() + aux_loss, inputs, allow_unused=True)
    return [hidden.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _is_close(tensor: Tensor, expected: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(tensor - expected) <= CLOSE * torch.linalg.vector_norm(expected))
