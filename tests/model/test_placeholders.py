"""Pictures go where their placeholders are, and nowhere else."""

from __future__ import annotations

from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch

import minimind_v.core.demo
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.model.vlm import VLM, find_placeholders

ASSETS = Path(minimind_v.core.demo.__file__).parent / "assets"
P = 4  # patches of one picture
AT = 5  # the placeholder's id


def read_embeddings(model: VLM, *inputs: object, **named: object) -> torch.Tensor:
    """What the decoder is given, [B, T, D]."""
    given = []
    handle = model.model.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        model(*inputs, **named)
    finally:
        handle.remove()
    return given[0]


def ids_of(*pieces: list[int]) -> torch.Tensor:
    return torch.tensor([list(chain(*pieces))])


PICTURE = [AT] * P


@torch.no_grad()
def test_two_adjacent_pictures(make_vlm):
    """One run of twice as many placeholders holds the first picture, then the second; all else stays text."""
    model, features = make_vlm(), torch.randn(2, P, 24)
    input_ids = ids_of([7, 9], PICTURE, PICTURE, [11, AT, 12])  # the last one is a user's own
    x = read_embeddings(model, input_ids, image_features=features)
    linear = model.vision_proj.vision_proj[0]
    torch.testing.assert_close(x[0, 2:10], features.flatten(0, 1) @ linear.weight.T + linear.bias)
    text = model.model.embed_tokens(input_ids)[0]
    assert torch.equal(x[0, :2], text[:2])
    assert torch.equal(x[0, 10:], text[10:])


@torch.no_grad()
def test_pictures_of_all_rows_in_reading_order(make_vlm):
    model, features = make_vlm(), torch.randn(3, P, 24)
    rows = torch.cat((ids_of(PICTURE, [7], PICTURE), ids_of([7, 8, 9], PICTURE, [7, 8])))
    x = read_embeddings(model, rows, image_features=features)
    projected = model.vision_proj(features)
    for row, at, picture in ((0, 0, 0), (0, 5, 1), (1, 3, 2)):
        assert torch.equal(x[row, at : at + P], projected[picture])


def test_embeddings_are_copied_as_masked_scatter_does_with_equal_gradients(make_vlm):
    model, features = make_vlm(), torch.randn(3, P, 24)
    rows = torch.cat((ids_of(PICTURE, [7], PICTURE), ids_of([7, 8, 9], PICTURE, [7, 8])))
    mask = find_placeholders(rows, AT, P)
    projected, text = model.vision_proj(features), model.model.embed_tokens(rows)
    expected = text.masked_scatter(mask[..., None], projected.flatten(0, 1))
    x = model.embed(rows, features, mask)
    assert torch.equal(x, expected)
    weights = [*model.vision_proj.parameters(), model.model.embed_tokens.weight]
    flow = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(x, weights, flow), torch.autograd.grad(expected, weights, flow), strict=True
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_positions_that_are_given_are_checked_by_their_number(make_vlm):
    model, positions = make_vlm(), torch.arange(P)
    with pytest.raises(ValueError, match="2 images do not match 4 placeholders"):
        model.embed(ids_of(PICTURE), torch.randn(2, P, 24), image_positions=positions)
    with pytest.raises(ValueError, match="4 image placeholders, but no images"):
        model.embed(ids_of(PICTURE), image_positions=positions)


@pytest.mark.parametrize(
    ("run", "pictures"), [(1, 0), (P - 1, 0), (P, 1), (P + 1, 1), (2 * P - 1, 1), (2 * P, 2), (3 * P, 3)]
)
def test_a_run_holds_as_many_pictures_as_fit(run, pictures):
    """Without a mask, whole pictures are found; a user's shorter run, or what is left over, stays text."""
    mask = find_placeholders(ids_of([1, 2], [AT] * run, [3]), AT, P)
    assert mask.tolist() == [[False] * 2 + [True] * (pictures * P) + [False] * (run - pictures * P + 1)]


# --- a user's own placeholders ----------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    return PromptEncoder(Tokenizer.load(ASSETS), P)


@pytest.fixture
def talker(make_vlm, encoder):
    """A model that knows the demo's words."""
    model = make_vlm(vocab_size=encoder.tokenizer.vocab_size)
    model.placeholder_id = encoder.tokenizer.placeholder_id
    return model


@pytest.mark.parametrize(
    "text", ["<image>\na@b", "@@@@ <image>", "@@@@<image>@@@@", "<image>@@@@@@@@", "@@@ <image><image> @"]
)
@torch.no_grad()
def test_own_runs_stay_text_beside_pictures(text, encoder, talker):
    """With the encoder's mask even a run as long as a picture, and touching one, is text."""
    tokens = encoder.prompt([{"role": "user", "content": text}])
    assert tokens.images == text.count("<image>")
    input_ids, mask = torch.tensor([tokens.input_ids]), torch.tensor([tokens.image_mask])
    features = torch.randn(tokens.images, P, 24)
    x = read_embeddings(talker, input_ids, image_features=features, image_mask=mask)
    assert int(mask.sum()) == tokens.images * P
    torch.testing.assert_close(x[mask], talker.vision_proj(features).flatten(0, 1))
    assert torch.equal(x[~mask], talker.model.embed_tokens(input_ids)[~mask])
    # Each picture stands behind exactly those of the user's own that the text has in front of its mark.
    own = (input_ids == talker.placeholder_id) & ~mask
    assert (input_ids[mask] == talker.placeholder_id).all()
    assert (
        own.cumsum(dim=1)[mask][::P].tolist()
        == list(accumulate(piece.count("@") for piece in text.split("<image>")))[:-1]
    )
    assert int(own.sum()) == text.count("@")


@torch.no_grad()
def test_own_runs_stay_text_without_pictures(encoder, talker):
    tokens = encoder.prompt([{"role": "user", "content": "@" * 3 * P}])
    input_ids = torch.tensor([tokens.input_ids])
    assert int((input_ids == talker.placeholder_id).sum()) == 3 * P
    for mask in (None, torch.tensor([tokens.image_mask])):
        x = read_embeddings(talker, input_ids, image_mask=mask)
        assert torch.equal(x, talker.model.embed_tokens(input_ids))


# --- pictures and placeholders that do not fit ------------------------------------------------------------------------


def test_wrong_number_of_pictures_names_the_row(make_vlm):
    model = make_vlm()
    rows = torch.cat((ids_of(PICTURE, [7] * 5), ids_of(PICTURE, [7], PICTURE)))
    with pytest.raises(ValueError, match=r"2 images.*row 0: 1, row 1: 2"):
        model(rows, image_features=torch.randn(2, P, 24))
    with pytest.raises(ValueError, match=r"4 images.*row 0: 1, row 1: 2"):
        model(rows, image_features=torch.randn(4, P, 24))


def test_pictures_by_row_name_the_row(make_vlm):
    """[B, N, …] says how many each row has, so a total that happens to be right is not enough."""
    model = make_vlm(with_tower=True)
    rows = torch.cat((ids_of(PICTURE, PICTURE, PICTURE), ids_of(PICTURE, [7] * 8)))  # 3 + 1 = 2 + 2
    with pytest.raises(ValueError, match="row 0 has placeholders for 3 images, but is given 2"):
        model(rows, pixel_values=torch.randn(2, 2, 3, 16, 16))
    rows = torch.cat((ids_of(PICTURE, PICTURE), ids_of(PICTURE, [7] * 4)))
    with pytest.raises(ValueError, match="row 1 has placeholders for 1 images, but is given 2"):
        model(rows, pixel_values=torch.randn(2, 2, 3, 16, 16))


def test_pictures_without_placeholders(make_vlm):
    with pytest.raises(ValueError, match="row 0: 0"):
        make_vlm()(ids_of([7, 8, 9]), image_features=torch.randn(1, P, 24))


def test_part_of_a_picture_names_the_row(make_vlm):
    rows = torch.cat((ids_of(PICTURE, [7]), ids_of(PICTURE, [7])))
    mask = rows == AT
    mask[1, 2:] = False
    with pytest.raises(ValueError, match=r"row 1 has placeholders for 0\.5 images, but needs a whole number"):
        make_vlm()(rows, image_features=torch.randn(2, P, 24), image_mask=mask)


def test_placeholders_without_pictures_name_the_row(make_vlm):
    """A mask that asks for a picture where none is given must not be answered from the text alone."""
    rows = torch.cat((ids_of([7] * 6), ids_of([7], PICTURE, [8])))
    with pytest.raises(ValueError, match="row 1"):
        make_vlm()(rows, image_mask=rows == AT)


# --- shapes of pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("rows", "per_row"), [(2, 1), (2, 3), (1, 2), (3, 2)])
@torch.no_grad()
def test_all_shapes_of_pixels_are_one(rows, per_row, dtype, make_vlm):
    model = make_vlm(with_tower=True)
    flat = torch.randint(0, 256, (rows * per_row, 3, 16, 16), dtype=torch.uint8).to(dtype)
    if dtype == torch.float32:
        flat = flat / 64 - 2
    row = torch.tensor([3, *[AT] * P * per_row, 4, 6, 8])
    input_ids = row.expand(rows, -1)
    expected = model(input_ids, pixel_values=flat).logits
    by_row = flat.view(rows, per_row, 3, 16, 16)
    for shaped in (by_row, by_row[:, :, None], by_row[:, None]):
        assert torch.equal(model(input_ids, pixel_values=shaped).logits, expected)
    features = model.vision_encoder(flat)
    assert torch.equal(model(input_ids, image_features=features).logits, expected)
    other = model(input_ids, pixel_values=flat.flip(0)).logits
    assert (other - expected).abs().max() > 1e-3, "pictures make no difference"


def test_pixels_need_a_vision_encoder(make_vlm):
    with pytest.raises(ValueError, match="without a vision encoder"):
        make_vlm()(ids_of(PICTURE), pixel_values=torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("use_moe", [False, True])
@torch.no_grad()
def test_text_rows_among_picture_rows(use_moe, make_vlm):
    """Each row of a mixed, padded batch is read as if alone."""
    model = make_vlm(with_tower=True, use_moe=use_moe)
    rows = [[3, *PICTURE, 8, 9], [10, AT, 12, 13, 14, 15, 16, 17, 18], [*PICTURE, 7, *PICTURE, 20, 21]]
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    together = model(input_ids, attention_mask=mask, pixel_values=pixels).logits
    for number, (row, own) in enumerate(zip(rows, (pixels[:1], None, pixels[1:]), strict=True)):
        alone = model(torch.tensor([row]), pixel_values=own).logits[0]
        torch.testing.assert_close(together[number, : len(row)], alone, atol=2e-5, rtol=0)
