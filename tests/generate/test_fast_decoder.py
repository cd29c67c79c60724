"""The decoder that talks is the model that was trained."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_v.core.generate.fast_decoder import FEW
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.rows import Row, Rows, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler
from tests.generate.made import KINDS, make_model

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="module")
def model(request):
    return make_model(seed=5, **request.param)


def ids_of(model, *shape):
    return torch.randint(6, model.config.vocab_size, shape)


@torch.inference_mode()
def test_chunks_and_single_tokens_give_the_models_logits(model):
    decoder, input_ids = ready(model).decoder, ids_of(model, 1, 60)
    expected, cache = model(input_ids).logits, ready(model).decoder.new_cache(1, 64)
    end = 0
    for chunk in (23, 1, 1, 7, FEW + 4, 1, 1):
        logits = decoder.read(model.embed(input_ids[:, end : end + chunk]), cache)
        end += chunk
        torch.testing.assert_close(logits, expected[:, end - 1], **CLOSE)


@pytest.mark.parametrize("rows", [3, FEW + 3])
@torch.inference_mode()
def test_rows_of_any_lengths_give_what_each_gives_alone(model, rows):
    decoder = ready(model).decoder
    lengths = [1 + (7 * row) % 23 for row in range(rows)]
    texts = [ids_of(model, 1, length + 5) for length in lengths]
    caches = [decoder.new_cache(1, length + 5) for length in lengths]
    prompts = [text[:, :length] for text, length in zip(texts, lengths, strict=True)]
    logits = torch.cat([decoder.read(model.embed(ids), cache) for ids, cache in zip(prompts, caches, strict=True)])
    for step in range(6):
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            torch.testing.assert_close(logits[row], model(text[:, : length + step]).logits[0, -1], **CLOSE)
        if step < 5:
            following = torch.cat([text[:, length + step] for text, length in zip(texts, lengths, strict=True)])
            logits = decoder.step(model.embed(following[:, None]), caches)
    assert [cache.used for cache in caches] == [length + 5 for length in lengths]


@torch.inference_mode()
def test_a_full_cache_is_an_error(model):
    cache = ready(model).decoder.new_cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens, but 5 are needed"):
        ready(model).decoder.read(model.embed(ids_of(model, 1, 5)), cache)


def prompts_of(model, count=20):
    """Prompts of one to three pictures and all lengths: ids, image mask, features."""
    prompts, patches, placeholder = [], model.spec.tokens_per_image, model.placeholder_id
    for number in range(count):
        ids, mask = [], []
        for _ in range(1 + number % 3):
            text_ids = ids_of(model, int(torch.randint(1, 30, ()))).tolist()
            ids += [*text_ids, *[placeholder] * patches]
            mask += [*[False] * len(text_ids), *[True] * patches]
        prompts.append(([*ids, 7, 9], [*mask, False, False], torch.randn(1 + number % 3, patches, model.spec.width)))
    return prompts


@torch.inference_mode()
def plain_greedy(model, ids, mask, features, eos_id, limit):
    """All read again for every token, by the model itself."""
    tokens = []
    while len(tokens) < limit:
        shown = torch.tensor([mask + [False] * len(tokens)])
        token = int(
            model(torch.tensor([ids + tokens]), image_features=features, image_mask=shown).logits[0, -1].argmax()
        )
        if token == eos_id:
            break
        tokens.append(token)
    return tokens


def answer_all(model, rows, eos_id=-1):
    """The ids of each row, all side by side."""
    together = Rows(model)
    for row in rows:
        together.add(row)
    while together:
        for drawn in together.step():
            assert drawn.error is None
            if drawn.token == eos_id or len(drawn.row.drawn) == drawn.row.max_new_tokens:
                together.remove(drawn.row)
    return [[token for token in row.drawn if token != eos_id] for row in rows]


@pytest.mark.long
def test_rows_side_by_side_get_the_greedy_tokens_of_each_alone(model):
    torch.manual_seed(2)
    prompts, limit = prompts_of(model), 12
    whole = [plain_greedy(model, *prompt, -1, limit) for prompt in prompts]
    eos_id = whole[3][4]  # so that some end early, and some not
    expected = [tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens for tokens in whole]
    assert len({len(tokens) for tokens in expected}) > 1

    def rows(limits):
        sampler = Sampler(GREEDY)
        return [
            Row(ids, sampler, limit, mask, list(features))
            for (ids, mask, features), limit in zip(prompts, limits, strict=True)
        ]

    assert [list(generate(model, row, eos_id)) for row in rows([limit] * len(prompts))] == expected
    limits = [limit - row % 4 for row in range(len(prompts))]
    generated = answer_all(model, rows(limits), eos_id)
    assert generated == [tokens[:limit] for tokens, limit in zip(expected, limits, strict=True)]


def test_images_must_match_their_placeholders(model):
    for images, mask in ((2, [True] * 3), (1, [False] * 3), (0, [True] * 3)):
        with pytest.raises(ValueError, match=f"{images} images do not match {sum(mask)} placeholders"):
            Row([7, 8, 9], Sampler(GREEDY), 5, mask, [torch.zeros(3, 4)] * images)


def test_greedy_tokens_are_those_of_llama():
    ours = make_model(seed=8, num_hidden_layers=3)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(ours.config, name) for name in (*names, "vocab_size", "rms_norm_eps")}
    config = LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": ours.config.rope_theta}
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    llama = LlamaForCausalLM(config).eval()
    text = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith(("model.", "lm_head."))}
    llama.load_state_dict(text)
    lengths = [3, 31, 12, 8, 50, 1, 19, 27]
    texts = [ids_of(ours, 1, length) for length in lengths]
    expected = [llama.generate(text, max_new_tokens=30, do_sample=False)[0, text.shape[1] :].tolist() for text in texts]

    def rows():
        return [Row(text[0].tolist(), Sampler(GREEDY), 30) for text in texts]

    assert answer_all(ours, rows()) == expected
    assert [list(generate(ours, row, -1)) for row in rows()] == expected


@torch.inference_mode()
def test_a_kernel_may_lay_out_its_result_as_it_likes(model, monkeypatch):
    """As CUDA's memory-efficient one does where there is a mask: [B, T, heads, hd], seen as [B, heads, T, hd]."""
    decoder, input_ids = ready(model).decoder, ids_of(model, 1, 9)
    attention, expected = F.scaled_dot_product_attention, model(input_ids).logits

    def otherwise(*args, **kwargs):
        return attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", otherwise)
    cache = decoder.new_cache(1, 9)
    for chunk in (input_ids[:, :7], input_ids[:, 7:8], input_ids[:, 8:]):
        logits = decoder.read(model.embed(chunk), cache)
    torch.testing.assert_close(logits, expected[:, -1], **CLOSE)
