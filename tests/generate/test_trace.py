"""Looking inside an answer: every number is that of transformers, or of a plain computation."""

import base64
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_v.core.data.images import blank_pixels
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import UsageError
from minimind_v.core.generate.engine import Engine
from minimind_v.core.generate.sampling import GREEDY
from minimind_v.core.generate.session import Session
from minimind_v.core.generate.trace import BATCH_BLOCKS, TraceSettings, encode_answer, paint, trace_answer
from tests.cli.harness import tokenizer
from tests.generate.made import KINDS, make_model
from tests.generate.test_prompt_cache import picture
from tests.model.test_decoder import qwen3_of
from tests.tokenizers_made import thinking_tokenizer

QUESTION = "What colour is the star? 有几个物体？"
PATCHES = 4  # of an image


def engine_of(model):
    return Engine(model, tokenizer(), most_rows=1)


def prompt_of(engine, images=1, question=QUESTION, think=False):
    content = "<image>" * images + question
    return engine.prompt([{"role": "user", "content": content}], [*map(picture, range(images))], think=think)


def traced(model, images=1, **settings):
    engine = engine_of(model)
    prompt = prompt_of(engine, images)
    return trace_answer(engine, prompt, TraceSettings(**{"max_new_tokens": 12} | settings)), prompt


def ids_of(model, trace):
    """The ids of a traced answer that was given as a text."""
    loaded = tokenizer()
    return [*loaded.encode(trace.answer).ids, loaded.eos_id]


def logits_of(model, prompt, answer_ids, images):
    """What the model itself gives in one forward pass → [T, V] at the answer's positions, and the text's ids."""
    tokens = prompt.tokens
    ids = torch.tensor([[*tokens.input_ids, *answer_ids]])
    mask = torch.tensor([[*tokens.image_mask, *[False] * len(answer_ids)]])
    pixels = torch.from_numpy(np.stack(images))
    with torch.no_grad():
        logits = model(ids, pixel_values=pixels, image_mask=mask).logits[0]
    return logits[len(tokens) - 1 : -1]


def bits_of(model, prompt, answer_ids, images):
    """−log₂ of each token's probability, number by number."""
    bits = []
    for row, token in zip(logits_of(model, prompt, answer_ids, images).double().tolist(), answer_ids, strict=True):
        most = max(row)
        total = sum(math.exp(value - most) for value in row)
        bits.append(-(row[token] - most - math.log(total)) / math.log(2))
    return bits


def rolled_up(attentions):
    """Attention rollout from the first layer up, as the paper has it: [L, H, T, T] → [T, T]."""
    rollout = np.eye(attentions.shape[-1])
    for layer in attentions.mean(1):
        rollout = (0.5 * layer + 0.5 * np.eye(len(layer))) @ rollout
    return rollout


def llama_of(model):
    """transformers' Llama with the tensors of a dense model."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size", "rms_norm_eps")  # fmt: skip
    config = LlamaConfig(**{name: getattr(model.config, name) for name in names}, tie_word_embeddings=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(language_model(model))
    return llama


def language_model(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vision_")}


OTHERS = {
    "dense": llama_of,
    "one head for all": llama_of,
    "normed heads": qwen3_of,
    "normed heads, one expert for a token": qwen3_of,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("images", [1, 3])
def test_attention_rollout_and_layers_are_those_of_transformers(kind, images):
    """Its class computes attention step by step, with nothing of ours but the embeddings of text and patches."""
    model = make_model(seed=3, **KINDS[kind])
    answer = " red circle 和 two"
    trace, prompt = traced(model, images, answer=answer)
    vision, model.vision_encoder = model.vision_encoder, None  # which its class does not have
    other = OTHERS[kind](model)
    other.set_attn_implementation("eager")
    ids = [*prompt.tokens.input_ids, *ids_of(model, trace)][:-1]
    first, at = len(prompt.tokens) - 1, np.flatnonzero(prompt.tokens.image_mask)
    with torch.no_grad():
        x = model.model.embed_tokens(torch.tensor([ids]))
        features = vision(torch.from_numpy(np.stack(prompt.images)))
        x[0, at] = model.vision_proj(features).flatten(0, 1)
        out = other(inputs_embeds=x, output_attentions=True, output_hidden_states=True)
        attentions = torch.cat(out.attentions).numpy()  # [L, H, T, T]
        expected = attentions[:, :, first:, at].transpose(2, 0, 1, 3)
        assert trace.attention.shape == (len(ids) - first, 2, 4, images * PATCHES)
        np.testing.assert_allclose(trace.attention, expected, atol=2e-6)
        np.testing.assert_allclose(trace.rollout, rolled_up(attentions)[first:, at], atol=2e-6)
        probabilities = out.logits[0, first:].softmax(-1)
        own = [float(row[id]) for row, id in zip(probabilities, ids_of(model, trace), strict=True)]
        np.testing.assert_allclose([token.probability for token in trace.tokens], own, rtol=2e-4)
        likeliest = [words[-1].value for words in (patch.layers for patch in trace.patches)]
        np.testing.assert_allclose(likeliest, out.logits[0, at].softmax(-1).max(-1).values, rtol=2e-4)
        # The state behind the first layer, of which transformers keeps the one before the final norm.
        lens = other.lm_head(other.model.norm(out.hidden_states[1][0, at])).softmax(-1).max(-1).values
        np.testing.assert_allclose([patch.layers[0].value for patch in trace.patches], lens, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_whole_forward_passes(kind):
    model = make_model(seed=8, **KINDS[kind])
    other = [picture(7), picture(8)]
    trace, prompt = traced(model, 2, answer="two stars 有一个", swap=other)
    ids = ids_of(model, trace)
    blank = [blank_pixels(16)] * 2
    assert [token.bits for token in trace.tokens] == pytest.approx(bits_of(model, prompt, ids, prompt.images), abs=1e-4)
    expected_blank = bits_of(model, prompt, ids, blank)
    assert [token.bits_blank for token in trace.tokens] == pytest.approx(expected_blank, abs=1e-4)
    assert trace.variants["blank"].bits == [token.bits_blank for token in trace.tokens]
    assert trace.variants["swapped"].bits == pytest.approx(bits_of(model, prompt, ids, other), abs=1e-4)
    assert trace.variants["swapped"].images == "another"
    assert np.ptp([token.gain for token in trace.tokens]) > 0.01, "the comparison would be empty"


def test_rivals_are_the_likeliest_other_tokens():
    model = make_model(seed=8)
    trace, prompt = traced(model, answer=" red circle")
    ids = ids_of(model, trace)
    for token, id, row in zip(trace.tokens, ids, logits_of(model, prompt, ids, prompt.images), strict=True):
        order = [other for other in row.argsort(descending=True).tolist() if other != id][:5]
        probabilities = row.double().softmax(-1)
        assert [word.value for word in token.rivals] == pytest.approx(probabilities[order].tolist(), rel=1e-4)
        assert token.bits == pytest.approx(-math.log2(token.probability), abs=1e-4)
    assert trace.tokens[-1].text == "<|im_end|>"


def test_words_of_a_patch_are_the_nearest_embeddings_that_are_words():
    model, loaded = make_model(seed=8), tokenizer()
    trace, prompt = traced(model)
    with torch.no_grad():
        [patches] = model.vision_proj(model.vision_encoder(torch.from_numpy(prompt.images[0])[None]))
    table = model.model.embed_tokens.weight.detach().double().numpy()
    for patch, embedding in zip(trace.patches, patches.double().numpy(), strict=True):
        cosines = table @ embedding / np.linalg.norm(table, axis=1) / np.linalg.norm(embedding)
        spelled = {}
        for id in np.argsort(-cosines):
            text = loaded.decode([int(id)])
            if any(map(str.isalnum, text)) and "\N{REPLACEMENT CHARACTER}" not in text:
                spelled.setdefault(text.strip().casefold(), (text.strip(), cosines[id]))
        expected = list(spelled.values())[:5]
        assert [word.text for word in patch.nearest] == [text for text, _ in expected]
        assert [word.value for word in patch.nearest] == pytest.approx([value for _, value in expected], abs=1e-5)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_occlusion_map_is_a_forward_pass_for_each_painted_patch(kind):
    model = make_model(seed=2, **KINDS[kind])
    trace, prompt = traced(model, 3, answer="green 大", occlusion=True)
    assert 3 * PATCHES > BATCH_BLOCKS, "else one batch holds all"
    assert trace.block == 1
    assert trace.occlusion.shape == (len(trace.tokens), 3 * PATCHES)
    ids = ids_of(model, trace)
    whole = np.array(bits_of(model, prompt, ids, prompt.images))
    for number in range(3 * PATCHES):
        images = [image.copy() for image in prompt.images]
        row, column = divmod(number % PATCHES, 2)
        images[number // PATCHES][:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 128
        lost = np.array(bits_of(model, prompt, ids, images)) - whole
        np.testing.assert_allclose(trace.occlusion[:, number], lost, atol=2e-4)
    assert np.abs(trace.occlusion).max() > 0.01, "the comparison would be empty"


@pytest.mark.parametrize("kind", ["dense", "experts", "normed heads"])
def test_answers_are_those_of_the_engine(kind):
    model = make_model(seed=4, **KINDS[kind])
    engine = engine_of(model)
    prompt = prompt_of(engine, 2)
    patches = [(0, 1), (1, 3)]
    trace = trace_answer(engine, prompt, TraceSettings(max_new_tokens=9))
    painted = trace_answer(engine, prompt, TraceSettings(max_new_tokens=9, occlude=patches))

    def answer(images):
        session = Session(model, tokenizer(), GREEDY)
        return "".join(session.ask("<image><image>" + QUESTION, images, 9))

    images = list(prompt.images)
    assert trace.answer == painted.answer == answer(images)
    assert trace.variants["blank"].answer == answer([blank_pixels(16)] * 2)
    assert trace.variants["swapped"].answer == answer(images[::-1])
    assert trace.variants["swapped"].images == "rotated"
    assert painted.variants["occluded"].answer == answer(paint(images, patches, 2))
    assert set(painted.variants) == {"blank", "occluded"}
    assert painted.occluded == patches


def test_the_likeliest_answer_is_no_likelier_than_its_tokens_alone():
    """A greedy answer's tokens are the likeliest, so none of their rivals has a higher probability."""
    trace, _ = traced(make_model(seed=4))
    assert len(trace.tokens) == 12
    for token in trace.tokens:
        assert token.probability >= token.rivals[0].value - 1e-6


def test_an_image_is_encoded_once_for_all_and_no_painted_one_is_kept(monkeypatch):
    model, encoded, reports = make_model(seed=2), [], []
    encode = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    engine = engine_of(model)
    prompt = prompt_of(engine, 2)
    for settings, new, blocks in (
        (TraceSettings(max_new_tokens=4), 3, 0),  # the two images, and a grey one; the swapped ones are the same two
        (TraceSettings(answer="a star"), 0, 0),
        (TraceSettings(answer="a star", occlusion=True), 2 * PATCHES, 2 * PATCHES),
        (TraceSettings(answer="a star", occlusion=True), 2 * PATCHES, 2 * PATCHES),
    ):
        encoded.clear()
        reports.clear()
        trace_answer(engine, prompt, settings, progress=lambda *report: reports.append(report))
        assert sum(encoded) == new
        assert reports == ([(0, blocks), (blocks, blocks)] if blocks else [])


def test_painting_all_patches_gives_the_blank_image():
    images = [picture(0), picture(1)]
    painted = paint(images, [(1, patch) for patch in range(9)], 3)  # 16 pixels are no multiple of 3
    np.testing.assert_array_equal(painted[0], images[0])
    np.testing.assert_array_equal(painted[1], blank_pixels(16))
    assert not (images[1] == 128).all()


def test_a_single_image_is_swapped_for_its_mirror_image():
    model = make_model(seed=8)
    trace, prompt = traced(model, answer="red")
    mirrored = [prompt.images[0][:, :, ::-1].copy()]
    assert trace.variants["swapped"].images == "mirrored"
    expected = bits_of(model, prompt, ids_of(model, trace), mirrored)
    assert trace.variants["swapped"].bits == pytest.approx(expected, abs=1e-4)


def test_reasoning_is_traced_too(tmp_path):
    loaded = Tokenizer.load(thinking_tokenizer(tmp_path))
    engine = Engine(make_model(seed=4, **KINDS["normed heads"]), loaded, most_rows=1)
    prompt = prompt_of(engine, think=True)
    text = "It is red.\n</think>\n\nred"
    assert encode_answer(engine, text).count(loaded.token_id("</think>")) == 1
    trace = trace_answer(engine, prompt, TraceSettings(answer=text, max_new_tokens=5))
    assert trace.answer == text
    assert "</think>" in [token.text for token in trace.tokens]


def test_json_holds_the_numbers_of_the_trace():
    trace, _ = traced(make_model(seed=8), 2, answer=" red 三", occlusion=True)
    data = trace.as_json()
    attention = data["attention"]
    shape = len(data["tokens"]), attention["layers"], attention["heads"], attention["patches"]
    levels = np.frombuffer(base64.b64decode(attention["data"]), np.uint8).reshape(shape)
    peaks = np.frombuffer(base64.b64decode(attention["peaks"]), "<f4").reshape(shape[:-1])
    weights = levels * attention["scale"] * peaks[..., None]
    assert np.abs(weights - trace.attention).max() <= trace.attention.max() / 509
    bits = np.frombuffer(base64.b64decode(data["occlusion"]["bits"]), "<f4").reshape(shape[0], -1)
    np.testing.assert_array_equal(bits, trace.occlusion)
    assert data["images"][0]["src"].startswith("data:image/png;base64,")
    assert (data["images"][0]["rows"], data["images"][0]["columns"]) == (2, 2)
    assert len(data["patches"]) == 2 * PATCHES
    assert len(data["patches"][0]["layers"]) == attention["layers"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"occlude": [(0, 4)]}, "patch 4 of image 0 cannot be painted"),
        ({"occlude": [(1, 0)]}, "images are 0 to 0"),
        ({"occlude": [(-1, 0)]}, "cannot be painted"),
        ({"swap": [picture(0), picture(1)]}, "2 images to swap for 1 images"),
        ({"answer": "red " * 4000}, "but there is room for"),
    ],
)
def test_what_cannot_be_traced_is_refused(settings, message):
    engine = engine_of(make_model(seed=8))
    with pytest.raises(UsageError, match=message):
        trace_answer(engine, prompt_of(engine), TraceSettings(**settings))


def test_a_question_without_an_image_is_refused():
    engine = engine_of(make_model(seed=8))
    with pytest.raises(UsageError, match="needs an image"):
        trace_answer(engine, prompt_of(engine, 0))


@pytest.mark.parametrize("settings", [{}, {"answer": "a star"}])
def test_what_the_check_raises_ends_the_work_between_tokens_and_between_batches(settings, monkeypatch):
    engine = engine_of(make_model(seed=8))
    prompt, calls, steps, step = prompt_of(engine), [], [], engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(None) or step())

    def check():
        calls.append(None)
        if len(calls) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        trace_answer(engine, prompt, TraceSettings(max_new_tokens=500, **settings), check=check)
    assert len(calls) == 2
    assert len(steps) < 10
    assert engine.step() is False, "nothing is left in the engine"
