"""A conversation: what is kept between turns changes nothing but the time that an answer takes."""

import numpy as np
import pytest
import torch

from minimind_v.core.data.images import blank_pixels, load_pixels
from minimind_v.core.errors import MissingInput, RowError, UsageError
from minimind_v.core.generate.prompt_cache import ready
from minimind_v.core.generate.sampling import GREEDY, Sampling
from minimind_v.core.generate.session import Session
from tests.cli.harness import sighted_model, tiny_data, tokenizer

FIRST, SECOND, THIRD = "有几个物体？", "What colour is the star?", "Is it big?"
END = [tokenizer().eos_id, *tokenizer().encode("\n").ids]


@pytest.fixture(scope="module")
def model():
    return sighted_model()


class Listening:
    """A sampler that keeps what it drew, and the first logits of an answer; with a script it draws that."""

    def __init__(self, sampler, script=None):
        self.sampler, self.script, self.drawn = sampler, script, []

    def __call__(self, logits, text_ids):
        if not self.drawn:
            self.logits = logits.clone()
        token = self.script.pop(0) if self.script else self.sampler(logits, text_ids)
        self.drawn.append(token)
        return token


@pytest.fixture
def talk(model):
    def start(sampling=GREEDY, script=None, **how):
        session = Session(model, tokenizer(), sampling, **how)
        session.sampler = Listening(session.sampler, script)
        return session

    return start


def pixels(number=0):
    return load_pixels(tiny_data().picture(number).read_bytes(), "picture", 64)


def answer(session, question, pictures=(), limit=8):
    """The ids of an answer, its end not counted."""
    session.sampler.drawn.clear()
    text = "".join(session.ask(question, pictures, limit))
    ids = [token for token in session.sampler.drawn if token != tokenizer().eos_id]
    assert tokenizer().decode(ids) == text
    assert session.new_tokens == len(ids)
    return ids


@torch.inference_mode()
def anew(model, turns, question, pictures, limit=8):
    """First logits and ids with nothing kept: all is read again for every token. `turns`: (question, answer's ids)."""
    prompts = Session(model, tokenizer(), GREEDY).prompts
    asked = [
        f"<image>\n{question}" if pictures and not n else question
        for n, question in enumerate([*dict(turns), question])
    ]
    tokens = prompts.prompt([{"role": "user", "content": asked[0]}])
    for (_, ids), following in zip(turns, asked[1:], strict=True):
        tokens.input_ids += [*ids, *END]
        tokens.image_mask += [False] * (len(ids) + len(END))
        tokens += prompts.follow_up(following)
    features = model.vision_encoder(torch.from_numpy(np.stack(pictures))) if pictures else None
    drawn, first = [], None
    while len(drawn) < limit:
        ids = torch.tensor([tokens.input_ids + drawn])
        mask = torch.tensor([tokens.image_mask + [False] * len(drawn)])
        logits = model(ids, image_features=features, image_mask=mask).logits[0, -1]
        first = logits if first is None else first
        if int(logits.argmax()) == tokenizer().eos_id:
            break
        drawn.append(int(logits.argmax()))
    return first, drawn


def check(model, session, turns, question, pictures):
    """Ask a greedy question that must be answered, to the logits, as if all before it were read again."""
    session.sampler.sampler = Session(model, tokenizer(), GREEDY).sampler
    ids = answer(session, question, [] if turns else pictures)
    logits, expected = anew(model, turns, question, pictures)
    assert torch.allclose(session.sampler.logits, logits, atol=1e-4)
    assert ids == expected
    return ids


@pytest.mark.parametrize("pictures", [0, 1])
def test_three_turns_give_what_reading_everything_again_gives(model, talk, pictures):
    session, shown = talk(), [pixels()] * pictures
    turns = []
    for question in (FIRST, SECOND, THIRD):
        turns.append((question, check(model, session, turns, question, shown)))
    assert all(ids for _, ids in turns)


def test_a_picture_may_come_with_a_later_question(talk):
    session = talk()
    answer(session, FIRST)
    answer(session, SECOND, [pixels()])
    assert [turn.images for turn in session.turns] == [0, 0, 1]


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_answer_that_is_stopped_counts_as_far_as_it_came(model, talk, stop):
    session = talk(Sampling(temperature=float("inf"), top_p=1.0, seed=3))  # talks on and on
    pieces = session.ask(FIRST, [pixels()], 400)
    while len(session.sampler.drawn) < stop:
        next(pieces)
    pieces.close()
    stopped = list(session.sampler.drawn)
    check(model, session, [(FIRST, stopped)], SECOND, [pixels()])


def test_an_answer_that_was_never_begun_was_never_asked_for(model, talk):
    session = talk()
    session.ask(FIRST, [pixels()]).close()
    turns = [(SECOND, check(model, session, [], SECOND, []))]
    session.ask("Something else entirely?").close()
    check(model, session, turns, THIRD, [])


class Interrupted:
    """Ctrl-C inside the last layer, in the so-many-th step."""

    def __init__(self, model, step):
        self.left = step
        self.layer = ready(model).decoder.layers[-1]
        self.mlp, self.layer.mlp = self.layer.mlp, self

    def __call__(self, x):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.mlp(x)

    def remove(self):
        self.layer.mlp = self.mlp


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_an_interruption_inside_the_model_leaves_a_conversation_that_continues(model, talk, step, turn):
    session, turns = talk(Sampling(temperature=float("inf"), top_p=1.0, seed=4)), []
    if turn:
        turns.append((FIRST, answer(session, FIRST, [pixels()])))
    asked = THIRD if turn else FIRST
    session.sampler.drawn.clear()
    interruption = Interrupted(model, step)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask(asked, [] if turn else [pixels()], 50))
    interruption.remove()
    if session.sampler.drawn:  # else the question itself was not read
        turns.append((asked, list(session.sampler.drawn)))
    check(model, session, turns, SECOND, [pixels()] if turns else [])


def test_restarting_forgets_everything(talk):
    session = talk()
    first = answer(session, FIRST)
    answer(session, SECOND, [pixels()])
    session.restart()
    assert answer(session, FIRST) == first


# --- the latest question anew -----------------------------------------------------------------------------------------


def test_a_question_in_place_of_the_latest_is_asked_as_if_that_had_never_been(model, talk):
    session = talk()
    turns = [(FIRST, answer(session, FIRST, [pixels()]))]
    answer(session, SECOND, [pixels(1)])
    "".join(session.ask(THIRD, (), 8, instead=True))
    assert [turn.images for turn in session.turns] == [0, 1, 0]
    assert len(session.images) == 1
    turns.append((THIRD, list(session.latest.ids)))
    check(model, session, turns, SECOND, [pixels()])


def test_the_first_question_can_be_replaced_and_so_can_its_replacement(talk):
    session, other = talk(), talk()
    answer(session, FIRST)
    for question in (SECOND, THIRD):
        "".join(session.ask(question, [pixels()], 8, instead=True))
    answer(other, THIRD, [pixels()])
    assert session.turns == other.turns


def test_a_replacement_that_is_not_read_leaves_the_latest_question(talk):
    session = talk()
    answer(session, FIRST, [pixels()])
    turns, latest = list(session.turns), session.latest
    session.ask(SECOND, instead=True).close()
    with pytest.raises(UsageError):
        session.ask("What is <image>?", instead=True)
    assert session.turns == turns
    assert session.latest is latest
    assert len(session.images) == 1


def test_a_replacement_brings_back_what_the_replaced_question_had_pushed_out(talk):
    session = talk(context=170)
    answer(session, FIRST, [pixels()])
    before = list(session.turns)
    while not session.dropped_turns:
        before = list(session.turns)
        answer(session, SECOND)
    "".join(session.ask("a", (), 1, instead=True))
    assert session.turns[1] == before[1]
    assert session.dropped_turns == 0


def test_before_any_question_nothing_can_be_repeated(talk):
    for repeat in (lambda s: s.ask(FIRST, instead=True), lambda s: s.trace(), lambda s: s.answer_blank()):
        with pytest.raises(UsageError, match="no question was asked yet"):
            repeat(talk())


@torch.inference_mode()
def plain_logprobs(model, prompt, images, ids):
    """Log-probabilities of an answer's tokens and of all tokens [T, V], in one pass without any cache."""
    features = model.vision_encoder(torch.from_numpy(np.stack(images))) if images else None
    mask = torch.tensor([[*prompt.tokens.image_mask, *[False] * len(ids)]])
    tokens = torch.tensor([[*prompt.tokens.input_ids, *ids]])
    logits = model(tokens, image_features=features, image_mask=mask).logits[0, -len(ids) - 1 : -1]
    table = logits.log_softmax(dim=-1)
    return table.gather(1, torch.tensor(ids)[:, None])[:, 0], table


@pytest.mark.parametrize("blank", [False, True])
def test_a_trace_has_the_probabilities_of_a_plain_pass_and_changes_nothing(model, talk, blank):
    session = talk(Sampling(temperature=2.0, top_p=1.0, seed=7))
    answer(session, FIRST, [pixels()])
    answer(session, SECOND, [pixels(1)])
    latest, turns = session.latest, list(session.turns)
    events = session.trace(likeliest=3, blank=blank)
    assert [event.token for event in events] == list(latest.ids)
    images = [blank_pixels(64)] * 2 if blank else latest.prompt.images
    own, table = plain_logprobs(model, latest.prompt, images, list(latest.ids))
    np.testing.assert_allclose([event.logprob for event in events], own, atol=1e-4)
    values, _ = table.topk(3)
    np.testing.assert_allclose([[value for _, value in event.likeliest] for event in events], values, atol=1e-4)
    assert session.latest is latest
    assert session.turns == turns


def test_the_blank_answer_is_that_to_grey_images_and_is_forgotten(talk):
    session, other = talk(), talk()
    answer(session, FIRST, [pixels()])
    turns = list(session.turns)
    assert "".join(session.answer_blank()) == "".join(other.ask(FIRST, [blank_pixels(64)], 8))
    assert session.turns == turns


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_system_prompt_is_read_first_and_lasts_until_the_restart(talk):
    session = talk(system="Answer in one word.")
    answer(session, FIRST)
    expected = session.prompts.turns(
        [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": FIRST}]
    )
    assert session.turns[0] == expected[0]
    plain = talk()
    answer(plain, FIRST)
    assert plain.turns[0] != session.turns[0]
    session.restart()
    answer(session, FIRST)
    assert session.turns == plain.turns
    with pytest.raises(UsageError, match="system prompt"):
        session.restart("an <image>")


def test_a_seed_begins_anew_when_the_settings_are_set(model):
    chance = Sampling(temperature=5.0, top_p=1.0, seed=3)
    session = Session(model, tokenizer(), chance)
    first = "".join(session.ask(FIRST, (), 8))
    again = "".join(session.ask(FIRST, (), 8, instead=True))
    session.sampling = chance
    assert first == "".join(session.ask(FIRST, (), 8, instead=True)) != again


def test_a_layout_without_reasoning_refuses_it_and_stays_as_it_is(talk):
    session = talk()
    with pytest.raises(UsageError, match="cannot think"):
        session.think = True
    assert not session.think


# --- too long ---------------------------------------------------------------------------------------------------------


def test_a_conversation_that_is_too_long_forgets_whole_turns_and_counts_them(model, talk):
    session, turns, dropped = talk(context=150), [], []
    for number in range(12):
        question = f"{(FIRST, SECOND, THIRD)[number % 3]} {number}"
        turns.append((question, answer(session, question, [] if turns else [pixels()])))
        dropped.append(session.dropped_turns)
    assert dropped[0] == 0
    assert sum(dropped) == 1 + len(turns) - len(session.turns) > 1
    assert session.images == [], "the image went with the first question"
    ids = answer(session, "And now?")
    logits, expected = anew(model, turns[2 - len(session.turns) :], "And now?", [])
    assert torch.allclose(session.sampler.logits, logits, atol=1e-4)
    assert ids == expected


def test_an_answer_ends_where_the_context_does(talk):
    session = talk(script=[40] * 500, context=100)
    assert 0 < len(answer(session, FIRST, limit=500)) < 100
    assert sum(map(len, session.turns)) <= 100 + len(END)


def test_a_question_that_is_refused_leaves_no_trace(model, talk):
    session = talk(context=300)
    turns = [(FIRST, answer(session, FIRST))]
    for refused in ("star " * 400, "What is <image>?"):
        with pytest.raises(UsageError):
            session.ask(refused)
    check(model, session, turns, SECOND, [])


@pytest.mark.parametrize("without_image", [0, 1])
def test_a_first_question_that_is_too_long_is_refused(talk, without_image):
    session = talk(context=60)
    with pytest.raises(UsageError, match="longer than 60 tokens"):
        session.ask("star " * 60 if without_image else FIRST, [] if without_image else [pixels()])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_may_be_a_file_or_its_pixels(talk):
    first, other = talk(), talk()
    answer(first, SECOND, [tiny_data().picture()])
    answer(other, SECOND, [pixels()])
    assert first.turns == other.turns
    assert torch.equal(first.sampler.logits, other.sampler.logits)


def test_the_k_th_picture_goes_to_the_k_th_mark(model, talk):
    logits = []
    for numbers in ((0, 1), (1, 0)):
        question, shown = "Is <image> brighter than <image>?", [pixels(number) for number in numbers]
        session = talk()
        answer(session, question, shown, 1)
        tokens = session.prompts.prompt([{"role": "user", "content": question}])
        features = model.vision_encoder(torch.from_numpy(np.stack(shown)))
        ids, mask = torch.tensor([tokens.input_ids]), torch.tensor([tokens.image_mask])
        expected = model(ids, image_features=features, image_mask=mask).logits[0, -1]
        torch.testing.assert_close(session.sampler.logits, expected, atol=1e-4, rtol=0)
        logits.append(session.sampler.logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_users_own_placeholders_are_no_picture(talk):
    session = talk()
    answer(session, "@" * 64)
    with pytest.raises(UsageError, match="1 <image> mark for 0 images"):
        session.ask("<image>")


def test_pictures_that_cannot_be_shown_are_reported(talk, tmp_path):
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    session = talk()
    with pytest.raises(RowError, match=r"page\.jpg: the image cannot be decoded \(an HTML page"):
        session.ask(FIRST, [tmp_path / "page.jpg"])
    with pytest.raises(MissingInput, match="no image file at"):
        session.ask(FIRST, [tmp_path / "none.jpg"])
    assert answer(session, FIRST) == answer(talk(), FIRST)


# --- text as it comes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["一个大的红色星形。", "naïve café 😀👍🏽!", "a b  c\n\nd", "白white色"])
def test_pieces_hold_whole_characters_and_make_up_the_text(talk, text):
    ids = tokenizer().encode(text).ids
    session = talk(script=[*ids, tokenizer().eos_id])
    pieces = list(session.ask(FIRST))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert len(pieces) > 1
    assert all(pieces)


def test_a_character_that_is_never_finished_is_shown_as_such(talk):
    ids = tokenizer().encode("😀").ids
    assert len(ids) > 2
    session = talk(script=[*tokenizer().encode("ab").ids, *ids[:2], tokenizer().eos_id])
    assert "".join(session.ask(FIRST)) == "ab�"


def test_special_tokens_are_not_shown(talk):
    ids = tokenizer().encode("ab").ids
    session = talk(script=[*ids, tokenizer().bos_id, tokenizer().pad_id, tokenizer().eos_id])
    assert "".join(session.ask(FIRST)) == "ab"


def test_an_answer_may_be_empty(talk, model):
    session = talk(script=[tokenizer().eos_id])
    assert answer(session, FIRST) == []
    check(model, session, [(FIRST, [])], SECOND, [])
