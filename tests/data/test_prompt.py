"""Conversations to token ids: layout, marks, supervision, truncation, and rows that are no conversations."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
from tokenizers import Tokenizer as FastTokenizer

from minimind_v.core.data import prompt
from minimind_v.core.data.layouts import ChatML
from minimind_v.core.data.prompt import IMAGE_MARK, PromptEncoder, Tokens
from minimind_v.core.data.tokenizer import Tokenizer
from minimind_v.core.errors import RowError

PATCHES = 5  # placeholders per picture, few enough to be read in a failure
PLENTY = 10**6  # a length that cuts nothing


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, PATCHES)


@pytest.fixture(scope="module")
def whole(tokenizer_folder) -> FastTokenizer:
    """The tokenizer as anybody else would use it: special tokens in the text are special tokens."""
    return FastTokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


# --- a slow implementation, written from the specification ------------------------------------------------------------


def render(conversation, patches):
    """The whole row as text; for each character its turn (0: opening), whether it is an answer, its picture or -1."""
    messages = list(conversation)
    if messages[0]["role"] != "system":
        messages.insert(0, system(ChatML.system_prompt))
    text, turns, answers, pictures = "", [], [], []
    picture = -1

    def add(piece, turn, answer=False, shows=-1):
        nonlocal text
        text += piece
        turns.extend([turn] * len(piece))
        answers.extend([answer] * len(piece))
        pictures.extend([shows] * len(piece))

    for number, message in enumerate(messages):
        turn = (number + 1) // 2
        answering = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", turn)
        rest = message["content"]
        while rest:
            if rest.startswith("<image>"):
                picture += 1
                add("@" * patches, turn, shows=picture)
                rest = rest[len("<image>") :]
            else:
                add(rest[0], turn, answer=answering)
                rest = rest[1:]
        add("<|im_end|>\n", turn, answer=answering)
    return text, turns, answers, pictures


def slow_row(whole, conversation, images, max_length, patches) -> Tokens | None:
    """What `PromptEncoder.row` must give, or None where the row cannot be used. No special tokens in the contents."""
    if conversation[-1]["role"] == "user":
        dropped = conversation[-1]["content"].count("<image>")
        conversation, images = conversation[:-1], images - dropped
    text, turns, answers, pictures = render(conversation, patches)
    assert max(pictures) + 1 == images
    encoding = whole.encode(text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    row = Tokens(encoding.ids, [answers[at] for at in starts], [pictures[at] >= 0 for at in starts])
    turn = [turns[at] for at in starts]
    lengths = [sum(t <= last for t in turn) for last in range(max(turn) + 1)]
    allowed = [length for length in lengths[1:] if length <= max_length]
    cut = max(allowed, default=min(max_length, lengths[1]))
    shown = [pictures[at] for at in starts]
    while any(shown[:cut].count(n) not in (0, patches) for n in range(images)):
        cut -= 1
    kept = {n for n in shown[:cut] if n >= 0}
    row = Tokens(row.input_ids[:cut], row.loss_mask[:cut], row.image_mask[:cut], len(kept))
    return row if any(row.loss_mask) else None


WORDS = [
    *(
        "a",
        "the picture",
        "What is this?",
        "Hello,",
        " two  spaces ",
        "\n",
        "\n\n",
        "\t",
        "   ",
        "def f(x):\n    return x",
    ),
    *(
        "描述一下",
        "这张图片。",
        "，",
        "狗",
        "émigré",
        "🐶",
        "👩‍👩‍👧",
        "✨!",
        "a@b.com",
        "@",
        "@@@",
        "@" * PATCHES,
        "0.5%",
    ),
    *(
        "<",
        "<im",
        "age>",
        "<image",
        "image>",
        "</image>",
        "<|",
        "|>",
        "im_end",
        "日本語テキスト",
        "ﷺ",
        "\u3000",
        "\x00",
    ),
]


def make_text(rng, marks):
    pieces = rng.choices(WORDS, k=rng.randint(0, 8))
    for _ in range(rng.choice(marks)):
        pieces.insert(rng.randint(0, len(pieces)), IMAGE_MARK)
    return rng.choice(["", "", " "]).join(pieces)  # pieces may make a further mark: "<im" + "age>"


def make_conversation(rng):
    conversation = [system(make_text(rng, (0,)).replace(IMAGE_MARK, ""))] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 4)):
        conversation += [user(make_text(rng, (0, 0, 1, 2))), assistant(make_text(rng, (0, 0, 0, 1)))]
    if rng.random() < 0.3:
        conversation.append(user(make_text(rng, (0, 1))))
    return conversation


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_agree_with_the_slow_implementation(encoder, whole, seed):
    rng = random.Random(seed)
    outcomes = {"whole": 0, "cut": 0, "refused": 0}
    for _ in range(150):
        conversation = make_conversation(rng)
        images = sum(message["content"].count(IMAGE_MARK) for message in conversation)
        max_length = rng.choice([PLENTY, rng.randint(1, 60), rng.randint(20, 160)])
        expected = slow_row(whole, conversation, images, max_length, PATCHES)
        if expected is None:
            with pytest.raises(RowError, match="prompt alone"):
                encoder.row(conversation, images, max_length)
            outcomes["refused"] += 1
            continue
        tokens = encoder.row(conversation, images, max_length)
        assert tokens == expected, (conversation, max_length)
        assert len(tokens) <= max_length
        outcomes["whole" if max_length == PLENTY else "cut"] += 1
    assert min(outcomes.values()) > 10, f"the generator misses a case: {outcomes}"


# --- layout -----------------------------------------------------------------------------------------------------------


def test_layout_of_a_chat(encoder, tokenizer):
    row = encoder.row([user("Hi"), assistant("Yes."), user("再见"), assistant("好")], 0, PLENTY)
    text = tokenizer.backend.decode(row.input_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n再见<|im_end|>\n<|im_start|>assistant\n好<|im_end|>\n"
    )
    assert row.input_ids.count(tokenizer.bos_id) == row.input_ids.count(tokenizer.eos_id) == 5
    assert not any(row.image_mask)


@pytest.mark.parametrize("own", ["Answer like a pirate.", "你是小狗", ""])
def test_a_rows_own_system_message_replaces_the_default(encoder, tokenizer, own):
    row = encoder.row([system(own), user("Hi"), assistant("Yes.")], 0, PLENTY)
    text = tokenizer.backend.decode(row.input_ids, skip_special_tokens=False)
    assert text.startswith(f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user\n")
    assert ChatML.system_prompt not in text


@pytest.mark.parametrize(
    "content",
    [
        *("", " ", "Hello", " leading", "trailing ", "a\n\nb\n", "    code = {1: [2]}\n\treturn", "it's 3.14% — ok"),
        *(
            "描述一下这个图像的内容。",
            "混合 mixed 文字text",
            "🐶🐱 👩‍👩‍👧‍👦",
            "a@b.com @you @@",
            "\n",
            "\r\n",
            "http://x.y/?q=1&r=2",
        ),
        *(
            "<image>",
            "<image>\nWhat?",
            "What is <image>?",
            "see <image>",
            "<image> here",
            "(<image>)",
            "<image>.<image>",
        ),
        *(
            "图<image>像",
            "<image><image>",
            "<image>\n<image>\n比较",
            "🐶<image>🐶",
            "@<image>@",
            "x@@@ <image> @@@y",
            "```<image>```",
        ),
    ],
)
@pytest.mark.parametrize("patches", [1, PATCHES, 196])
def test_ids_are_those_of_the_whole_string(tokenizer, whole, content, patches):
    encoder = PromptEncoder(tokenizer, patches)
    images = content.count(IMAGE_MARK)
    for conversation in ([user(content), assistant("Yes.")], [user(content), assistant(content)]):
        text, *_ = render(conversation, patches)
        marks = images * sum(message["content"] == content for message in conversation)
        row = encoder.row(conversation, marks, PLENTY)
        assert row.input_ids == whole.encode(text, add_special_tokens=False).ids
        assert sum(row.image_mask) == marks * patches
        assert row.images == marks


def test_the_model_reads_in_chat_what_it_read_in_training(encoder):
    conversation = [user("<image>\nWhat?"), assistant("A dog."), user("颜色？"), assistant("黄色")]
    trained = encoder.row(conversation, 1, PLENTY)
    asked = encoder.prompt(conversation[:-1])
    assert trained.input_ids[: len(asked)] == asked.input_ids
    assert trained.image_mask[: len(asked)] == asked.image_mask
    assert trained.loss_mask[len(asked)]
    assert not trained.loss_mask[len(asked) - 1]
    assert asked.images == 1
    first = encoder.row(conversation[:2], 1, PLENTY)
    assert first.input_ids + encoder.follow_up("颜色？").input_ids == asked.input_ids


# --- what a user writes is only text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 195, 196, 197, 392])
@pytest.mark.parametrize(
    "template", ["{run}", "{run}<image>", "<image>{run}", "{run}<image>{run}", "a {run} b <image>"]
)
def test_a_users_own_placeholders_are_never_a_picture(tokenizer, length, template):
    encoder = PromptEncoder(tokenizer, 196)
    content = template.format(run="@" * length)
    images = content.count(IMAGE_MARK)
    row = encoder.row([user(content), assistant("@" * length)], images, PLENTY)
    assert row.images == images
    assert sum(row.image_mask) == images * 196
    assert row.input_ids.count(tokenizer.placeholder_id) == images * 196 + content.count("@") + length
    before = content.partition(IMAGE_MARK)[0].count("@")
    if images:  # the picture begins right behind the user's own
        at = [n for n, token in enumerate(row.input_ids) if token == tokenizer.placeholder_id]
        assert [n for n, patch in enumerate(row.image_mask) if patch] == at[before : before + 196]


@pytest.mark.parametrize(
    "written", ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "a<|im_end|>\n<|im_start|>b"]
)
def test_special_tokens_that_somebody_writes_stay_text(encoder, tokenizer, written):
    conversation = [system(written), user(f"<image>{written}"), assistant(f"{written} yes")]
    row = encoder.row(conversation, 1, PLENTY)
    assert row.input_ids.count(tokenizer.bos_id) == 3
    assert row.input_ids.count(tokenizer.eos_id) == 3
    assert tokenizer.pad_id not in row.input_ids
    assert written in tokenizer.decode([i for i, patch in zip(row.input_ids, row.image_mask, strict=True) if not patch])
    header = [tokenizer.bos_id, *tokenizer.encode("assistant\n").ids]
    begin = row.loss_mask.index(True)
    assert row.input_ids[begin - len(header) : begin] == header
    assert all(row.loss_mask[begin:]), "the answer goes to the end of the row"


def _ids(tokenizer, text):
    return tokenizer.encode(text).ids


def test_special_tokens_stay_text_in_a_worker_that_was_spawned(tokenizer):
    text = "a<|im_end|>b<|im_start|>"
    expected = tokenizer.encode(text).ids
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), copy.copy(tokenizer)):
        assert twin.encode(text).ids == expected
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_ids, tokenizer, text).result(timeout=120) == expected
    assert tokenizer.eos_id not in expected


@pytest.fixture
def merging(tokenizer_folder, tmp_path) -> Tokenizer:
    """A tokenizer that merges placeholders with each other and with the space in front."""
    tree = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    for left, right in (("@", "@"), ("Ġ", "@"), ("@", "a")):
        vocab[left + right] = len(vocab)
        merges.append([left, right])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["<image>", "see <image>", "<image>a", "@<image>@@", "@@ <image><image>a@", "\n<image>"]
)
def test_a_tokenizer_that_merges_placeholders_cannot_swallow_a_picture(merging, content):
    encoder = PromptEncoder(merging, PATCHES)
    assert len(merging.encode("@@@@").ids) < 4, "the fixture merges"
    images = content.count(IMAGE_MARK)
    row = encoder.row([user(content), assistant(content + " end")], 2 * images, PLENTY)
    patches = [token for token, patch in zip(row.input_ids, row.image_mask, strict=True) if patch]
    assert patches == [merging.placeholder_id] * PATCHES * images * 2
    text_ids = [token for token, patch in zip(row.input_ids, row.image_mask, strict=True) if not patch]
    assert merging.decode(text_ids).endswith(content.replace(IMAGE_MARK, "") + " end\n")
    answer = [token for token, mask in zip(row.input_ids, row.loss_mask, strict=True) if mask]
    assert merging.decode(answer) == content.replace(IMAGE_MARK, "") + " end\n"


# --- supervision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", ["Yes.", "", "\n", "\nYes", "\n\n\nYes\n", "好的🐶", " Yes ", "assistant\n", "@@@", "no\n\n"]
)
def test_exactly_the_answers_are_supervised(encoder, tokenizer, answer):
    row = encoder.row([user("Q"), assistant(answer), user(answer), assistant("last")], 0, PLENTY)
    taught = [token for token, mask in zip(row.input_ids, row.loss_mask, strict=True) if mask]
    newline = tokenizer.encode("\n").ids
    first, second = (tokenizer.encode(text).ids for text in (answer, "last"))
    assert taught == [*first, tokenizer.eos_id, *newline, *second, tokenizer.eos_id, *newline]


def test_a_picture_in_an_answer_is_read_and_not_supervised(encoder, tokenizer):
    row = encoder.row([user("Q"), assistant("see <image> there")], 1, PLENTY)
    assert sum(row.image_mask) == PATCHES
    assert not any(mask and patch for mask, patch in zip(row.loss_mask, row.image_mask, strict=True))
    taught = [token for token, mask in zip(row.input_ids, row.loss_mask, strict=True) if mask]
    assert tokenizer.decode(taught) == "see  there\n"


# --- too long ---------------------------------------------------------------------------------------------------------

TALK = [user("<image>\nWhat?"), assistant("A dog on the grass."), user("And <image>?"), assistant("A cat.")]


def test_whole_turns_are_kept_at_every_length(encoder):
    full = encoder.row(TALK, 2, PLENTY)
    first = encoder.row(TALK[:2], 1, PLENTY)
    asked = encoder.prompt(TALK[:1])
    for max_length in range(1, len(full) + 2):
        if max_length <= len(asked):
            with pytest.raises(RowError, match="prompt alone") as caught:
                encoder.row(TALK, 2, max_length)
            assert caught.value.kind == "too long"
            continue
        expected = min(max_length, len(first)) if max_length < len(full) else len(full)
        row = encoder.row(TALK, 2, max_length)
        assert len(row) == expected
        assert row.input_ids == full.input_ids[:expected]
        assert row.loss_mask == full.loss_mask[:expected]
        assert row.image_mask == full.image_mask[:expected]
        assert row.images == (2 if expected == len(full) else 1), "pictures of turns that were cut away go with them"


def test_a_later_turn_that_would_fit_does_not_jump_the_queue(encoder):
    talk = [user("a"), assistant("b"), user("long " * 50), assistant("no"), user("c"), assistant("d")]
    row = encoder.row(talk, 0, len(encoder.row(talk[:2], 0, PLENTY)) + 30)
    assert row == encoder.row(talk[:2], 0, PLENTY)


def test_no_cut_goes_through_a_picture_of_the_first_answer(encoder):
    talk = [user("Q"), assistant("see <image><image> there")]
    full = encoder.row(talk, 2, PLENTY)
    begin = full.image_mask.index(True)
    for max_length in range(begin, len(full) + 1):
        whole_pictures = min(2, (max_length - begin) // PATCHES)
        row = encoder.row(talk, 2, max_length)
        assert row.images == whole_pictures
        assert sum(row.image_mask) == whole_pictures * PATCHES
        inside = begin + whole_pictures * PATCHES
        assert len(row) == (inside if whole_pictures < 2 else max_length)


@pytest.mark.parametrize(
    "talk", [["word " * 300, "b"], ["<image>", "word " * 300], ["a", "b", "c", "字" * 3000, "d", "e"]]
)
def test_a_text_without_end_is_cut_before_it_is_encoded(encoder, monkeypatch, talk):
    conversation = [(user, assistant)[n % 2](text) for n, text in enumerate(talk)]
    images = sum(text.count(IMAGE_MARK) for text in talk)

    def outcome():
        try:
            return encoder.row(conversation, images, 80)
        except RowError as error:
            return error.kind

    expected, lengths = outcome(), []
    encode = Tokenizer.encode
    monkeypatch.setattr(prompt, "TEXT_LIMIT", 600)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: lengths.append(len(text)) or encode(self, text))
    assert outcome() == expected
    assert max(lengths) < 650
    assert len(max(talk, key=len)) > 1000


def test_a_last_question_without_an_answer_goes_with_its_picture(encoder):
    answered = [user("<image>a"), assistant("b")]
    assert encoder.row([*answered, user("and <image>?")], 2, PLENTY) == encoder.row(answered, 1, PLENTY)
    assert encoder.row([*answered, user("and?")], 1, PLENTY) == encoder.row(answered, 1, PLENTY)


@pytest.mark.parametrize("opening", [[], [system("Be brief.")]])
def test_a_question_alone_teaches_nothing(encoder, opening):
    with pytest.raises(RowError, match="no answer"):
        encoder.row([*opening, user("Hi")], 0, PLENTY)
    assert encoder.prompt([*opening, user("Hi")]).input_ids, "but it can be answered"


@pytest.mark.parametrize(("marks", "images"), [(1, 0), (2, 1), (1, 2), (1, 3)])
def test_marks_and_pictures_must_agree(encoder, marks, images):
    with pytest.raises(RowError, match=f"{marks} <image> marks? for {images} images?") as caught:
        encoder.row([user(IMAGE_MARK * marks), assistant("x")], images, PLENTY)
    assert caught.value.kind == "placeholders"


@pytest.mark.parametrize("images", [1, 3])
def test_pictures_without_any_mark_leave_a_text_row(encoder, images):
    row = encoder.row([user("Hi"), assistant("x")], images, PLENTY)
    assert row == encoder.row([user("Hi"), assistant("x")], 0, PLENTY)
    assert (row.images, row.unmarked) == (0, images)


# --- rows that are no conversations -----------------------------------------------------------------------------------

ANSWERED = [user("a"), assistant("b")]
MALFORMED = {
    "none": None,
    "empty": [],
    "dict": {"role": "user", "content": "a"},
    "text": '[{"role": "user"}]',
    "number": 3,
    "truth": True,
    "numbers": [1, 2],
    "nothings": [None, None],
    "lists": [["user", "a"], ["assistant", "b"]],
    "texts": ["a", "b"],
    "no role": [{"content": "a"}, assistant("b")],
    "no content": [{"role": "user"}, assistant("b")],
    "foreign keys": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    "unknown role": [{"role": "human", "content": "a"}, assistant("b")],
    "role in capitals": [{"role": "User", "content": "a"}, assistant("b")],
    "role none": [{"role": None, "content": "a"}, assistant("b")],
    "role list": [{"role": ["user"], "content": "a"}, assistant("b")],
    "role dict": [{"role": {}, "content": "a"}, assistant("b")],
    "role without end": [{"role": "user" * 10**5, "content": "a"}, assistant("b")],
    "content none": [user(None), assistant("b")],
    "content number": [user(3), assistant("b")],
    "content nan": [user(float("nan")), assistant("b")],
    "content list": [user([{"type": "text", "text": "a"}]), assistant("b")],
    "content bytes": [user(b"a"), assistant("b")],
    "answer none": [user("a"), assistant(None)],
    "two users": [user("a"), user("b"), assistant("c")],
    "two answers": [user("a"), assistant("b"), assistant("c")],
    "assistant first": [assistant("b"), user("a")],
    "only assistant": [assistant("b")],
    "only system": [system("s")],
    "two systems": [system("s"), system("t"), *ANSWERED],
    "system behind": [*ANSWERED, system("s")],
    "system between": [user("a"), system("s"), assistant("b")],
    "half a character": [user("a\ud800"), assistant("b")],
    "half an answer": [user("a"), assistant("\udfff")],
    "half a system": [system("\ud83d"), *ANSWERED],
    "picture in the system": [system("<image>"), *ANSWERED],
}


@pytest.mark.parametrize("conversation", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_row_is_a_row_error_in_one_short_line(encoder, conversation):
    with pytest.raises(RowError) as caught:
        encoder.row(conversation, 0, PLENTY)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 200
    message.encode("utf-8")


def test_a_rows_messages_are_left_as_they_were(encoder):
    conversation = [system("s"), *ANSWERED, user("more")]
    before = copy.deepcopy(conversation)
    encoder.row(conversation, 0, 30)
    encoder.prompt(conversation)
    assert conversation == before
