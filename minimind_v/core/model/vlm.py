"""The vision-language model: image features replace the embeddings of their placeholders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimind_v.core.config.schema import LINEAR, ModelConfig, TextConfig, VisionSpec
from minimind_v.core.model.decoder import Decoder
from minimind_v.core.model.kv_cache import KVCache
from minimind_v.core.model.loss import supervised, supervised_loss
from minimind_v.core.model.projector import find_projector, projected
from minimind_v.core.model.vision.encoder import VisionEncoder


@dataclass
class Output:
    """The result of a forward pass. Without labels: `logits`; with labels: the losses."""

    logits: Tensor | None  # [B, K, V] for the last K positions
    loss_sum: Tensor | None  # sum over supervised tokens: a step divides by those of all its micro-batches
    correct: Tensor | None  # [S], for each supervised token in reading order: whether it was the likeliest
    aux_loss: Tensor  # the balance of experts in training; 0 without experts

    @property
    def loss(self) -> Tensor:
        """Mean loss of this batch's supervised tokens plus the auxiliary loss."""
        assert self.loss_sum is not None, "a loss needs labels"
        assert self.correct is not None
        return self.loss_sum / max(len(self.correct), 1) + self.aux_loss


class VLM(nn.Module):
    """Vision tower → projector → language model. Without `vision` it reads text only, or features that are given.

    State-dict keys are those of the published checkpoints (`model.*`, `lm_head.weight`, `vision_proj.*`) and
    `vision_encoder.*`, which is never saved.
    """

    def __init__(
        self,
        config: TextConfig,
        spec: VisionSpec,
        placeholder_id: int,
        vision: VisionEncoder | None = None,
        projector: str = LINEAR,
    ) -> None:
        """`spec` is that of the vision tower. Raises UsageError for a projector that does not exist or fit."""
        super().__init__()
        self.config = config
        self.model_config = ModelConfig(config, spec, projector)
        self.spec = projected(spec, projector)  # its tokens_per_image are those that leave the projector
        self.placeholder_id = placeholder_id
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision_proj = find_projector(projector)(spec, config.hidden_size)
        self.vision_encoder = vision
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        return KVCache(self.config, batch, max_length, self.device, self.lm_head.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        image_positions: Tensor | None = None,
        supervised_positions: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        """Logits of a right-padded batch of rows, or with `labels` the loss.

        input_ids [B, T]; attention_mask [B, T], 1 for tokens, 0 for padding (None: no padding);
        pixel_values [M, 3, H, W], all images of the batch in reading order, or [B, N, 3, H, W], or 6-D with one
        dimension of 1 at index 2 or 1; image_features [M, P, width] in place of pixels; image_mask [B, T], true where
        an image's feature goes (None: runs of the placeholder id); labels [B, T], -100 where not supervised;
        logits_to_keep: only the last K positions (0: all).

        A data worker may know beforehand what would be read off the masks, for which a GPU would have to wait:
        image_positions [M · P], in the flattened batch, what image_mask says; supervised_positions [S] and their next
        tokens targets [S], what labels say.

        Raises ValueError naming the row whose placeholders do not fit its images.
        """
        per_row = None
        if pixel_values is not None and image_features is None:
            pixel_values, per_row = _flatten_images(pixel_values)  # [M, 3, H, W]
            if self.vision_encoder is None:
                raise ValueError("this model was built without a vision encoder: give image_features")
            image_features = self.vision_encoder(pixel_values)  # [M, P, width]
        x = self.embed(input_ids, image_features, image_mask, per_row, image_positions)  # [B, T, D]
        if targets is None and labels is not None:
            supervised_positions, targets = supervised(labels)  # [S] each
        if targets is None:
            hidden, aux_loss = self.model(x, attention_mask, cache)  # [B, T, D]
            return Output(self.lm_head(hidden[:, -logits_to_keep:]), None, None, aux_loss)  # [B, K, V]
        hidden, aux_loss = self.model(x, attention_mask, cache, supervised_positions)  # [S, D]
        loss_sum, correct = supervised_loss(self.lm_head(hidden), targets)
        if torch.is_grad_enabled() and not loss_sum.requires_grad:  # only the projector trains, and there is no image
            loss_sum = loss_sum + 0 * sum(weight.sum() for weight in self.vision_proj.parameters())
        return Output(None, loss_sum, correct, aux_loss)

    def embed(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        per_row: int | None = None,
        image_positions: Tensor | None = None,
    ) -> Tensor:
        """The input of the language model: embeddings [B, T, D] of ids, and projected features at the placeholders.

        Arguments and errors are those of `forward`; per_row is the number of images that each row must have, if known.
        """
        x = self.model.embed_tokens(input_ids)  # [B, T, D]
        if image_features is None:
            if image_positions is not None:
                if len(image_positions):
                    raise ValueError(f"there are {len(image_positions)} image placeholders, but no images")
            elif image_mask is not None and image_mask.any():
                row = int(image_mask.any(dim=1).nonzero()[0])
                raise ValueError(f"row {row} has image placeholders, but no images")
            return x
        embeddings = self.vision_proj(image_features.to(x.dtype)).to(x.dtype)  # [M, P, D]
        if image_positions is None:
            image_positions = self._find_positions(input_ids, embeddings, image_mask, per_row)  # [M · P]
        if len(image_positions) != embeddings.shape[:2].numel():
            raise ValueError(f"{len(embeddings)} images do not match {len(image_positions)} placeholders")
        return x.flatten(0, 1).index_copy(0, image_positions, embeddings.flatten(0, 1)).view_as(x)  # [B, T, D]

    def _find_positions(
        self, input_ids: Tensor, embeddings: Tensor, image_mask: Tensor | None, per_row: int | None
    ) -> Tensor:
        """The positions of the placeholders in the flattened batch, [M · P]; embeddings [M, P, D]."""
        images, tokens, _ = embeddings.shape
        if image_mask is None:
            image_mask = find_placeholders(input_ids, self.placeholder_id, tokens)  # [B, T]
        counts = image_mask.sum(dim=1) / tokens  # images per row [B]
        for row, count in enumerate(counts.tolist()):
            if (per_row is not None and count != per_row) or count != int(count):
                expected = "needs a whole number" if per_row is None else f"is given {per_row}"
                raise ValueError(f"row {row} has placeholders for {count:g} images, but {expected}")
        if int(counts.sum()) != images:
            row_counts = ", ".join(f"row {row}: {int(count)}" for row, count in enumerate(counts.tolist()))
            raise ValueError(f"{images} images do not match the placeholders: {row_counts}")
        return image_mask.flatten().nonzero()[:, 0]


def find_placeholders(input_ids: Tensor, placeholder_id: int, patches: int) -> Tensor:
    """Mask [B, T] of whole images: in each run of the placeholder id, as many stretches of `patches` as fit."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate((input_ids == placeholder_id).tolist()):
        start = 0
        while start < len(ids):
            end = start
            while end < len(ids) and ids[end]:
                end += 1
            mask[row, start : start + (end - start) // patches * patches] = True
            start = end + 1
    return mask


def _flatten_images(pixel_values: Tensor) -> tuple[Tensor, int | None]:
    """[M, 3, H, W] or [B, N, (1,) 3, H, W] → [M, 3, H, W] and, from a shape with N, the images per row."""
    if pixel_values.ndim == 6:
        pixel_values = pixel_values.squeeze(1 if pixel_values.shape[2] != 1 else 2)
    if pixel_values.ndim == 5:
        return pixel_values.flatten(0, 1), pixel_values.shape[1]
    return pixel_values, None
