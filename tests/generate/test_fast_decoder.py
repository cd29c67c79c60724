"""The decoder that talks is the model that was trained."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_v.core.generate.engine import generate, generate_rows
from minimind_v.core.generate.fast_decoder import FEW
from minimind_v.core.generate.prompt_cache import ready
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
def test_padded_rows_give_what_each_gives_alone(model, rows):
    decoder = ready(model).decoder
    lengths = [1 + (7 * row) % 23 for row in range(rows)]
    texts = [ids_of(model, 1, length + 5) for length in lengths]
    ids, mask = torch.full((rows, max(lengths)), 3), torch.zeros(rows, max(lengths), dtype=torch.bool)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids[row, :length], mask[row, :length] = text[0, :length], True
    cache = decoder.new_cache(rows, max(lengths) + 5)
    logits = decoder.read(model.embed(ids), cache, mask)
    for step in range(6):
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            torch.testing.assert_close(logits[row], model(text[:, : length + step]).logits[0, -1], **CLOSE)
        if step < 5:
            following = torch.cat([text[:, length + step] for text, length in zip(texts, lengths, strict=True)])
            logits = decoder.read(model.embed(following[:, None]), cache)
    assert cache.lengths.tolist() == [length + 5 for length in lengths]


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


def test_rows_side_by_side_get_the_greedy_tokens_of_each_alone(model):
    torch.manual_seed(2)
    prompts, limit = prompts_of(model), 12
    whole = [plain_greedy(model, *prompt, -1, limit) for prompt in prompts]
    eos_id = whole[3][4]  # so that some end early, and some not
    expected = [tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens for tokens in whole]
    assert len({len(tokens) for tokens in expected}) > 1
    limits = [limit - row % 4 for row in range(len(prompts))]
    longest = max(len(ids) for ids, *_ in prompts)
    input_ids, shown, real = torch.full((20, longest), 3), *torch.zeros(2, 20, longest, dtype=torch.bool)
    for row, (ids, mask, features) in enumerate(prompts):
        input_ids[row, : len(ids)], shown[row, : len(ids)] = torch.tensor(ids), torch.tensor(mask)
        real[row, : len(ids)] = True
        alone = generate(
            model,
            ready(model).decoder.new_cache(1, 200),
            torch.tensor([ids]),
            Sampler(GREEDY),
            eos_id,
            limit,
            features,
            torch.tensor([mask]),
        )
        assert list(alone) == expected[row]
    generated = [[] for _ in prompts]
    cache = ready(model).decoder.new_cache(20, longest + limit)
    features = torch.cat([image_features for *_, image_features in prompts])
    samplers = [Sampler(GREEDY)] * 20
    for step in generate_rows(model, cache, input_ids, samplers, eos_id, limits, real, features, shown):
        for row, token in step:
            generated[row].append(token)
    assert generated == [tokens[:limit] for tokens, limit in zip(expected, limits, strict=True)]


def test_a_cache_that_is_full_ends_all_rows(model):
    ids = ids_of(model, 2, 6)
    cache = ready(model).decoder.new_cache(2, 9)
    steps = list(generate_rows(model, cache, ids, [Sampler(GREEDY)] * 2, -1, [50, 50]))
    assert [sorted(row for row, _ in step) for step in steps] == [[0, 1]] * 4  # the fourth is made, and not read


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
    ids, real = torch.zeros(8, 50, dtype=torch.long), torch.arange(50) < torch.tensor(lengths)[:, None]
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = text[0]
    generated = [[] for _ in texts]
    cache = ready(ours).decoder.new_cache(8, 80)
    for step in generate_rows(ours, cache, ids, [Sampler(GREEDY)] * 8, -1, [30] * 8, real):
        for row, token in step:
            generated[row].append(token)
    assert generated == expected
    for text, tokens in zip(texts, expected, strict=True):
        cache = ready(ours).decoder.new_cache(1, 80)
        assert list(generate(ours, cache, text, Sampler(GREEDY), -1, 30)) == tokens


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
