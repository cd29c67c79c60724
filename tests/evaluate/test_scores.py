"""Scores: the loss by hand, and answers that are right exactly where the model would really give them."""

import json
import multiprocessing

import pytest
import torch
import torch.nn.functional as F

from minimind_v.core.data.dataset import RowDataset
from minimind_v.core.data.feature_cache import FeatureEncoder, open_feature_cache
from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.data.prompt import PromptEncoder
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import DataError
from minimind_v.core.evaluate.run import SHORT, evaluate
from minimind_v.core.generate.rows import Row, generate
from minimind_v.core.generate.sampling import GREEDY, Sampler
from minimind_v.core.generate.session import Session
from minimind_v.core.rows.stores import open_rows
from tests.cli.harness import read_rows, sighted_model, tiny_data, tokenizer, write_rows
from tests.tokenizers_made import thinking_tokenizer

QUESTIONS = [
    "有几个物体？",
    "What colour is the star?",
    "圆形在哪里？",
    "Is the cross big or small?",
    "Is there a red star?",
]
LIMIT = 40


@pytest.fixture(scope="module")
def model():
    return sighted_model()


@pytest.fixture(scope="module")
def prompts(model):
    return PromptEncoder(tokenizer(), model.spec.tokens_per_image)


@pytest.fixture
def score(model, prompts, tmp_path):
    def run(rows, blank=False, max_length=1536, **how):
        data = open_rows(write_rows(tmp_path / "rows.jsonl", rows), tiny_data().folder)
        dataset = RowDataset(data, prompts, 64, max_length, blank)
        return evaluate(model, dataset, tokenizer().pad_id, tokenizer().eos_id, **{"workers": 0} | how)

    return run


def pixels(number):
    return load_pixels(tiny_data().picture(number).read_bytes(), "picture", 64)


def row(turns, picture=None):
    """A row of (question, answer) pairs."""
    texts = [message for turn in turns for message in turn]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    if picture is None:
        return {"conversations": messages}
    messages[0]["content"] = f"<image>\n{messages[0]['content']}"
    return {"conversations": messages, "image": tiny_data().picture(picture).name}


@torch.inference_mode()
def greedy(model, prompts, row, turn, shown=None):
    """What the model really answers in a turn of a row, after the true turns before it; None where it does not end."""
    tokens = prompts.prompt(row["conversations"][: 2 * turn + 1])
    images = () if shown is None else [shown]
    answer = Row(tokens.input_ids, Sampler(GREEDY), LIMIT, tokens.image_mask, images)
    drawn = list(generate(model, answer, tokenizer().eos_id))
    return drawn if len(drawn) < LIMIT else None


def test_an_answer_is_right_where_the_model_gives_it_and_wrong_where_it_gives_another(model, prompts, score):
    """Half of the rows hold what the model says by itself, half something else."""
    rows, expected = [], []
    for number, question in enumerate(QUESTIONS * 2):
        own = greedy(model, prompts, row([(question, "")], number), 0, pixels(number))
        text = tokenizer().decode(own or [])
        if own is None or len(own) >= SHORT or tokenizer().encode(text).ids != own:
            continue
        for truth in (text, f"{text} red", text[:-1] or "no"):
            rows.append(row([(question, truth)], number))
            expected.append(tokenizer().encode(truth).ids == own)
    scores = score(rows)
    assert True in expected
    assert expected.count(False) > expected.count(True)
    assert [marks[0] for marks in scores.answers.values()] == expected
    assert scores.accuracy == expected.count(True) / len(expected)


def test_the_score_agrees_with_a_conversation(model, score):
    """The same rows, asked one by one as `mmv chat` would."""
    session = Session(model, tokenizer(), GREEDY)
    rows = [row([(question, "big")], number) for number, question in enumerate(QUESTIONS)]
    for number, question in enumerate(QUESTIONS):
        session.restart()
        rows.append(row([(question, "".join(session.ask(question, [pixels(number)], LIMIT)))], number))
    expected = []
    for number, sample in enumerate(rows):
        session.restart()
        question, truth = (message["content"] for message in sample["conversations"])
        expected.append("".join(session.ask(question, [pixels(number % len(QUESTIONS))], LIMIT)) == truth)
    marks = [marks[0] for marks in score(rows).answers.values()]
    assert sum(mark is not None for mark in marks) >= len(QUESTIONS)
    assert all(mark in (None, right) for mark, right in zip(marks, expected, strict=True))
    assert True in marks


def test_the_score_agrees_with_a_conversation_in_the_layout_of_minimind_3v(model, tmp_path):
    """A prompt of chat ends with an empty think block, so the scored answer follows one, too."""
    words = Tokenizer.load(thinking_tokenizer(tmp_path / "words"))
    session, rows, expected = Session(model, words, GREEDY), [], []
    for number, question in enumerate(QUESTIONS):
        session.restart()
        own = "".join(session.ask(question, [pixels(number)], LIMIT))
        for truth in (own, "big"):
            if session.new_tokens < SHORT - 1 and own == words.decode(words.encode(own).ids):
                rows.append(row([(question, truth)], number))
                expected.append(own == truth)
    data = open_rows(write_rows(tmp_path / "rows.jsonl", rows), tiny_data().folder)
    dataset = RowDataset(data, PromptEncoder(words, model.spec.tokens_per_image), 64, 1536)
    scores = evaluate(model, dataset, words.pad_id, words.eos_id, workers=0)
    assert [marks[0] for marks in scores.answers.values()] == expected
    assert True in expected
    assert False in expected


def test_every_turn_is_scored_after_the_true_turns_before_it(model, prompts, score):
    rows = read_rows(tiny_data().data("sft"))[:8]
    for number, sample in enumerate(rows):
        sample["image"] = tiny_data().picture(number).name
    marks = list(score(rows).answers.values())
    right = 0
    for number, (sample, answers) in enumerate(zip(rows, marks, strict=True)):
        assert len(answers) == len(sample["conversations"]) // 2
        for turn, answer in enumerate(answers):
            truth = tokenizer().encode(sample["conversations"][2 * turn + 1]["content"]).ids
            expected = greedy(model, prompts, sample, turn, pixels(number)) == truth
            assert answer == (expected if len(truth) < SHORT else None)
            right += answer is True
    assert right > 0
    assert sum(map(len, marks)) > 20


@pytest.mark.parametrize("length", [SHORT - 1, SHORT, SHORT + 1])
def test_short_is_so_many_tokens_with_the_end(score, length):
    text = "a" * (length - 1)
    assert len(tokenizer().encode(text).ids) == length - 1
    scores = score([row([("What?", text)])])
    assert scores.short_answers == (length <= SHORT)
    assert scores.accuracy == (0.0 if length <= SHORT else None)


def test_a_cut_answer_is_neither_right_nor_wrong(score, prompts):
    whole = row([("What?", "red")])
    length = len(prompts.row(whole["conversations"], 0, 1000))
    assert score([whole], max_length=length).short_answers == 1
    scores = score([whole], max_length=length - 2)  # without the end and the newline
    assert scores.short_answers == 0
    assert list(scores.answers.values()) == [[None]]
    assert scores.loss > 0


def test_the_loss_is_the_mean_over_all_supervised_tokens(model, prompts, score):
    rows = [row([("What?", "a long answer that takes many tokens"), ("And?", "no")], 3), row([("有几个物体？", "两")])]
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample, shown in zip(rows, (pixels(3), None), strict=True):
            tokens = prompts.row(sample["conversations"], sample.get("image") is not None, 1000)
            features = None if shown is None else model.vision_encoder(torch.from_numpy(shown.copy())[None])
            ids, mask = (torch.tensor([values]) for values in (tokens.input_ids, tokens.image_mask))
            logits = model(ids, image_features=features, image_mask=mask).logits[0]
            chosen = torch.tensor(tokens.loss_mask[1:])
            total += float(F.cross_entropy(logits[:-1][chosen], ids[0, 1:][chosen], reduction="sum"))
            count += int(chosen.sum())
    scores = score(rows, batch_size=2)
    assert scores.supervised_tokens == count
    assert scores.loss == pytest.approx(total / count, rel=1e-5)
    assert scores.perplexity == pytest.approx(torch.tensor(scores.loss).exp().item())


def test_blind_is_a_grey_picture_and_no_other_one(model, prompts, score):
    """The same number of tokens, none of which shows anything of the row's own picture."""
    rows = [row([("What colour is the star?", "red")], number) for number in range(3)]
    seeing, blind = score(rows), score(rows, blank=True)
    assert seeing.loss != blind.loss
    assert seeing.supervised_tokens == blind.supervised_tokens
    result = score([row([("What colour is the star?", "red")], 0)], blank=True)
    assert result.loss == pytest.approx(blind.loss)
    with torch.inference_mode():
        tokens = prompts.row(rows[0]["conversations"], 1, 1000)
        features = model.vision_encoder(torch.from_numpy(blank_pixels(64))[None])
        ids, mask = (torch.tensor([values]) for values in (tokens.input_ids, tokens.image_mask))
        logits = model(ids, image_features=features, image_mask=mask).logits[0]
        chosen = torch.tensor(tokens.loss_mask[1:])
        loss = F.cross_entropy(logits[:-1][chosen], ids[0, 1:][chosen])
    assert result.loss == pytest.approx(float(loss), rel=1e-5)


def test_how_rows_are_batched_changes_nothing(score):
    rows = [row([(question, "big" * (number + 1))], number) for number, question in enumerate(QUESTIONS)]
    alone, together, ahead = score(rows, batch_size=1), score(rows, batch_size=5), score(rows, batch_size=2, workers=2)
    assert alone.answers == together.answers == ahead.answers
    assert alone.loss == pytest.approx(together.loss, rel=1e-5)
    assert alone.loss == pytest.approx(ahead.loss, rel=1e-5)
    assert multiprocessing.active_children() == []


def test_a_limit_takes_the_first_rows(score):
    rows = [row([(question, "big")]) for question in QUESTIONS]
    limited, first = score(rows, limit=2), score(rows[:2])
    assert (limited.rows, limited.loss) == (2, first.loss)
    assert score(rows, limit=99).rows == len(rows)


def test_broken_rows_are_kept_apart(score, tmp_path):
    good, marked = row([("What?", "red")]), row([("<image>What?", "red")])
    scores = score([good, "{", json.dumps({"conversations": marked["conversations"], "image": "none.jpg"}), good])
    assert scores.rows == 2
    assert [broken.location.rpartition(":")[2] for broken in scores.broken] == ["2", "3"]
    assert scores.loss == pytest.approx(score([good]).loss)


def test_a_picture_without_a_mark_is_not_required(score):
    good = row([("What?", "red")])
    scores = score([good, good | {"image": "none.jpg"}])
    assert (scores.rows, scores.text_rows, scores.broken) == (2, 1, [])
    assert scores.loss == pytest.approx(score([good]).loss)


def test_nothing_to_score_is_an_error_that_names_the_first_trouble(score):
    with pytest.raises(
        DataError, match=r"rows\.jsonl: no row could be evaluated; the first problem: .*rows\.jsonl:1: not JSON"
    ):
        score(["{", "{"])


def test_scoring_changes_nothing_in_the_model(model, score):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    score([row([("What?", "red")], 0)])
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_batches(score):
    counts = []
    score([row([("What?", "red")])] * 5, batch_size=2, progress=lambda done, total: counts.append((done, total)))
    assert counts == [(1, 3), (2, 3), (3, 3)]


# --- as training computes ---------------------------------------------------------------------------------------------


def test_the_precision_is_that_of_validation(score):
    """In bf16 products are rounded: the loss is another one, and about the same."""
    rows = [row([("What is this?", "A red star.")], picture=n) for n in range(3)]
    exact, rounded = score(rows, dtype="float32").loss, score(rows, dtype="bfloat16").loss
    assert score(rows).loss == exact, "a CPU's own precision is fp32"
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


def test_features_that_are_stored_are_not_encoded_again(score, model, tmp_path):
    rows = [row([("What is this?", "A red star.")], picture=n) for n in range(3)]
    encoder, lines = FeatureEncoder(model.vision_encoder, torch.device("cpu"), "auto"), []
    first, again = (
        open_feature_cache("exact", tmp_path / "features", encoder, 3, lines.append, lines.append) for _ in range(2)
    )
    fresh = score(rows).loss
    assert [score(rows, memory=memory).loss for memory in (first, again)] == [fresh, fresh]
    assert (first.encoded, again.encoded) == (3, 0)
