"""The page in a browser, with a server that answers as a test says."""

import io
import json
import re

import pytest
from PIL import Image

from minimind_v.core.data.images import decode
from tests.serve.page_actions import (
    answers,
    ask,
    ask_and_wait,
    attach,
    encoded,
    open_conversation,
    scene,
    sent_images,
)
from tests.serve.stub import ABILITIES, PAGE

pytestmark = pytest.mark.long
HALF = 4  # words of the stub's answer that have come when a test acts while it grows


def requested(page, stub, count):
    """Wait until the page has asked the server so often."""
    while len(stub.requests) < count:
        page.wait_for_timeout(20)


# --- questions and answers --------------------------------------------------------------------------------------------


def test_a_question_with_images_is_sent_as_it_is_and_the_answer_is_shown_as_it_comes(page, stub):
    first, second = scene(1), scene(2)
    attach(page, ("a.png", first), ("b.png", second))
    page.click(".thumbnails li:nth-child(1) button")
    attach(page, ("c.png", first))
    assert ask_and_wait(page, "What is this?") == stub.answer
    assert sent_images(stub.requests[0]) == [second, first]
    assert stub.requests[0]["messages"][0]["content"][-1] == {"type": "text", "text": "What is this?"}
    assert page.locator(".thumbnails img").count() == 0
    assert page.locator(".stats").text_content().startswith("8 tokens · ")
    assert ask_and_wait(page, "And now?") == stub.answer
    roles = [message["role"] for message in stub.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert stub.requests[1]["messages"][1]["content"] == stub.answer
    assert page.locator("#announcer").text_content() == f"Answer: {stub.answer}"


def test_images_can_be_dropped_and_pasted(page, stub):
    give = """([kind, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "scene.png", { type: "image/png" }));
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: files, bubbles: true, cancelable: true });
        document.querySelector(kind === "drop" ? "#thread" : "#question").dispatchEvent(event);
    }"""
    for number, kind in enumerate(("drop", "paste")):
        page.evaluate(give, [kind, list(scene(number))])
        page.locator(".thumbnails img").nth(number).wait_for()
    ask_and_wait(page, "Which is larger?")
    assert sent_images(stub.requests[0]) == [scene(0), scene(1)]


def test_a_photo_can_be_taken_with_the_camera(page, stub):
    page.context.grant_permissions(["camera"])
    page.click("[data-key='question:camera']")
    page.locator("#camera .primary:enabled").click()
    page.locator(".thumbnails img").wait_for()
    ask_and_wait(page, "Who is this?")
    (photo,) = sent_images(stub.requests[0])
    assert Image.open(io.BytesIO(photo)).format == "JPEG"
    assert page.locator("#camera").is_hidden()


def test_an_answer_can_be_stopped_and_repeated_and_both_versions_stay(page, stub):
    stub.held = HALF
    ask(page, "Describe it.")
    page.locator(".answer > .text:visible").wait_for()
    page.keyboard.press("Escape")
    stopped = answers(page)[0]
    assert stub.answer.startswith(stopped)
    assert stopped != stub.answer
    assert page.locator(".notice").text_content() == "Stopped."
    stub.held = None
    page.click("[data-key$=':retry']")
    page.locator(".answer .versions").wait_for()
    assert answers(page) == [stub.answer]
    assert "2/2" in page.locator(".answer .versions").text_content()
    page.click(".answer .versions [aria-label='Previous version']")
    assert answers(page) == [stopped]


def test_an_edited_question_is_a_branch_and_the_first_one_can_be_shown_again(page, stub):
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "What colour?")
    ask_and_wait(page, "Which shape?")
    stub.answer = "Two."
    page.hover(".question")
    page.locator(".question [data-key$=':edit']").first.click()
    page.fill(".question textarea", "How many?")
    page.press(".question textarea", "Enter")
    page.locator(".question .versions").wait_for()
    assert answers(page) == ["Two."]
    assert sent_images(stub.requests[-1]) == [scene()]
    assert len(stub.requests[-1]["messages"]) == 1
    page.click(".question .versions [aria-label='Previous version']")
    assert page.locator(".question .text").all_text_contents() == ["What colour?", "Which shape?"]
    assert len(answers(page)) == 2


def test_markup_in_an_answer_is_shown_as_text(page, stub):
    stub.answer = "<img src=x onerror=alert(1)> <b>bold</b> &amp; **stars**"
    assert ask_and_wait(page, "<i>Hi</i>") == stub.answer
    assert page.locator(".messages img, .messages b, .messages i").count() == 0


def test_reasoning_is_folded_and_notices_are_shown(page, stub):
    stub.reasoning, stub.dropped_turns, stub.finish = "First look, then speak.", 3, "length"
    ask_and_wait(page, "Why?")
    assert page.locator(".reasoning p").text_content().strip() == stub.reasoning
    assert page.locator(".reasoning p").is_hidden()
    page.click(".reasoning summary")
    assert page.locator(".reasoning p").is_visible()
    notices = " ".join(page.locator(".notice").all_text_contents())
    assert "earliest 3 turns" in notices
    assert "limit of tokens" in notices


def test_enter_of_an_input_method_does_not_send(page, stub):
    page.fill("#question", "nihao")
    enter = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    page.evaluate(f"() => document.getElementById('question').dispatchEvent({enter})")
    page.press("#question", "Shift+Enter")
    assert page.input_value("#question") == "nihao\n"
    assert stub.requests == []


VIEWER = """export async function mount(element, trace, { ask, language }) {
    element.append(`${language}: ${trace.answer}`);
    const changed = await ask({ occlude: [[0, 3]] });
    element.append(` → ${changed.answer} ${JSON.stringify(changed.occlude)}`);
}"""


def test_an_answer_about_an_image_can_be_looked_into(open_page, stub, stub_server):
    stub.viewer = VIEWER
    page = open_page(stub_server.url)
    ask_and_wait(page, "Without an image")
    assert page.locator("[data-key$=':look']").count() == 0
    page.keyboard.press("Alt+n")
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "What?")
    question = stub.requests[-1]["messages"]
    page.click("[data-key$=':look']")
    page.locator("#look", has_text=f"en: {stub.answer} → another answer [[0,3]]").wait_for()
    traced, painted = stub.requests[-2:]
    assert (traced["messages"], traced["answer"], traced["model"]) == (question, stub.answer, "tiny")
    assert "answer" not in painted
    page.keyboard.press("Escape")
    assert page.locator("#look").is_hidden()


def test_a_further_question_inside_an_answer_ends_the_one_before(open_page, stub, stub_server):
    stub.viewer = """export async function mount(element, trace, { ask }) {
        const first = ask({ occlude: [[0, 1]] }).then(() => "answered", (error) => error.name);
        await ask({ occlude: [[0, 3]] });
        element.append(`first: ${await first}`);
    }"""
    page = open_page(stub_server.url)
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "What?")
    page.click("[data-key$=':look']")
    page.locator("#look", has_text="first: ").wait_for()
    assert "first: AbortError" in page.locator("#look").text_content()


def test_without_a_viewer_nothing_offers_to_look_inside(page):
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "What?")
    assert page.locator("[data-key$=':look']").count() == 0


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_large_photo_is_upright_and_no_longer_than_2048_pixels(page, stub):
    photo = Image.new("RGB", (3000, 1500), "blue")
    photo.paste("red", (0, 0, 600, 1500))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: its left is the top
    attach(page, ("photo.jpg", encoded(photo, "JPEG", exif=exif)))
    ask_and_wait(page, "?")
    (sent,) = sent_images(stub.requests[0])
    upright = decode(sent, "sent")
    assert upright.size == (1024, 2048)
    assert upright.getpixel((512, 100))[0] > 200
    assert upright.getpixel((512, 1900))[2] > 200


def test_a_small_turned_photo_is_sent_as_it_is(page, stub):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(Image.new("RGB", (300, 150), "blue"), "JPEG", exif=exif)
    attach(page, ("photo.jpg", photo))
    ask_and_wait(page, "?")
    assert sent_images(stub.requests[0]) == [photo]
    box = page.locator(".image img").bounding_box()
    assert box["height"] > box["width"]


def test_a_file_of_many_bytes_is_sent_as_a_smaller_one(page, stub):
    noise = Image.effect_noise((2000, 1200), 90)
    attach(page, ("noise.png", encoded(Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]), "PNG")))
    ask_and_wait(page, "?")
    (sent,) = sent_images(stub.requests[0])
    assert len(sent) < 4 << 20
    assert decode(sent, "sent").size == (2000, 1200)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_image_that_moves_is_sent_as_its_first_frame(page, stub, form):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    attach(page, ("moving", encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)))
    ask_and_wait(page, "?")
    sent = Image.open(io.BytesIO(sent_images(stub.requests[0])[0]))
    assert (sent.format, getattr(sent, "n_frames", 1)) == ("PNG", 1)
    assert sent.convert("RGB").getpixel((5, 5)) == (255, 0, 0)


def test_files_that_are_no_images_are_named_and_the_others_are_added(page):
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    files = [("notes.txt", b"hello"), ("IMG_1.HEIC", heic), ("ok.png", scene())]
    payload = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]
    page.set_input_files("#compose input[multiple]", payload)
    page.locator(".thumbnails img").wait_for()
    said = " ".join(page.locator(".toast").all_text_contents())
    assert "notes.txt is not an image" in said
    assert "IMG_1.HEIC is a HEIC photo" in said
    assert page.locator(".thumbnails img").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_a_message_covers_neither_answer_nor_images_and_stands_amid_the_conversation(
    open_page, stub, stub_server, width
):
    stub.answer = "A long answer. " * 120
    page = open_page(stub_server.url, viewport={"width": width, "height": 780})
    ask_and_wait(page, "What is this?")
    payload = [{"name": name, "mimeType": "image/png", "buffer": data}
               for name, data in (("notes.txt", b"hello"), ("ok.png", scene()))]  # fmt: skip
    page.set_input_files("#compose input[multiple]", payload)
    page.locator(".thumbnails img").wait_for()
    toast = page.locator(".toast")
    toast.wait_for()
    toast.hover()  # it stays
    box, thread, form = (page.locator(name).bounding_box() for name in (".toast", "#thread", ".message-form"))
    assert thread["y"] + thread["height"] <= box["y"]
    assert box["y"] + box["height"] <= form["y"]
    bottom = "name => document.querySelector(name).getBoundingClientRect().bottom"
    page.wait_for_function(
        f"limit => ({bottom})('.answer footer') <= limit", arg=box["y"]
    )  # the answer's end is in view
    assert abs(box["x"] + box["width"] / 2 - (form["x"] + form["width"] / 2)) <= 1


def test_a_file_that_the_browser_cannot_read_is_reported_and_blocks_nothing(page, stub):
    page.evaluate("""() => {
        const { slice } = Blob.prototype;
        Blob.prototype.slice = () => {
            Blob.prototype.slice = slice;
            return { arrayBuffer: () => Promise.reject(new Error("the file is gone")) };
        };
    }""")
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": scene(n)} for n in (1, 2)]
    page.set_input_files("#compose input[multiple]", files)
    page.locator(".toast", has_text="the file is gone").wait_for()
    page.locator(".thumbnails img").wait_for()
    ask_and_wait(page, "What is this?")
    assert sent_images(stub.requests[0]) == [scene(2)]


def test_a_question_has_no_more_images_than_the_model_has_room_for(open_page, stub, stub_server):
    stub.models = {"small": ABILITIES | {"context": 512, "tokens_per_image": 196}}
    page = open_page(stub_server.url)
    payload = [{"name": "a.png", "mimeType": "image/png", "buffer": scene()}] * 3
    page.set_input_files("#compose input[multiple]", payload)
    page.locator(".toast").wait_for()
    assert "room for one image in a question" in page.locator(".toast").text_content()
    assert page.locator(".thumbnails img").count() == 1


# --- models, keys and settings ----------------------------------------------------------------------------------------


def test_the_page_offers_what_the_chosen_model_can(open_page, stub, stub_server):
    stub.models = {"sees": ABILITIES | {"thinks": False, "format": "pth"}, "reads": ABILITIES | {"images": False}}
    page = open_page(stub_server.url)
    assert page.locator("[data-key='question:choose']").is_visible()
    assert page.locator(".facts").text_content() == "26.1M parameters · sft · one image takes 64 of 4,096 tokens"
    page.keyboard.press("Alt+s")
    assert page.locator("#set-think").count() == 0
    assert "false" not in page.inner_text("#settings")
    page.keyboard.press("Escape")
    page.select_option("#model", "reads")
    assert page.locator("[data-key='question:choose']").count() == 0
    page.keyboard.press("Alt+s")
    page.check("#set-think")
    page.keyboard.press("Escape")
    ask_and_wait(page, "Hi")
    assert (stub.requests[0]["model"], stub.requests[0]["think"]) == ("reads", True)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.input_value("#model") == "reads"
    assert page.locator("#model option").all_text_contents() == ["sees (pth)", "reads"]


def test_settings_are_sent_when_they_are_set_and_valid(page, stub):
    values = {"temperature": 0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "max_tokens": 77}
    ask_and_wait(page, "Before")
    assert set(stub.requests[0]) == {"model", "messages", "stream", "stream_options"}
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#set-system", "Be brief.")
    page.fill("#set-seed", "-3")
    assert page.get_attribute("#set-seed", "aria-invalid") == "true"
    assert "A number from 0" in page.locator("#set-seed-hint").text_content()
    page.keyboard.press("Escape")
    ask_and_wait(page, "After")
    request = stub.requests[1]
    assert {name: request[name] for name in values} == values
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "seed" not in request
    page.click("#open-settings")
    page.click("text=Back to the defaults")
    page.keyboard.press("Escape")
    ask_and_wait(page, "Again")
    assert set(stub.requests[2]) == set(stub.requests[0])


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser, stub, stub_server):
    stub.key = "secret-key"
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(stub_server.url)
    for attempt in ("wrong", stub.key):
        page.fill("#key-input", attempt)
        page.press("#key-input", "Enter")
        if attempt == "wrong":
            page.locator("#key .problem").wait_for()
    page.wait_for_selector("#model option", state="attached")
    assert ask_and_wait(page, "Hi") == stub.answer
    stored = "() => [Object.values(localStorage).join(), Object.values(sessionStorage).join()]"
    local, session = page.evaluate(stored)
    assert stub.key not in local
    assert stub.key in session
    context.close()


def test_examples_are_cards_that_ask_their_question(open_page, stub, stub_server):
    stub.examples = [{"image": "/page/examples/scene.png", "question": "What colour?", "answer": "blue"}]
    page = open_page(stub_server.url)
    page.locator(".card", has_text="What colour?").click()
    page.locator(".stats").wait_for()
    assert answers(page) == [stub.answer]
    assert sent_images(stub.requests[0]) == [scene()]


# --- history ----------------------------------------------------------------------------------------------------------


def test_a_reload_keeps_the_conversation_its_images_and_its_branches(page, stub):
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "First question")
    stub.answer = "Another."
    page.click("[data-key$=':retry']")
    page.locator(".answer .versions").wait_for()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.locator(".answer .versions").wait_for()
    assert answers(page) == ["Another."]
    assert page.locator(".question .image img").count() == 1
    ask_and_wait(page, "More")
    assert sent_images(stub.requests[-1]) == [scene()]
    page.keyboard.press("Alt+n")
    assert page.locator(".welcome").is_visible()
    open_conversation(page, "First question")
    assert answers(page) == ["Another.", "Another."]


def test_a_question_is_shown_and_the_page_is_busy_before_the_history_has_stored_it(open_page, stub, stub_server):
    hold = "window.held = []; Object.defineProperty(IDBTransaction.prototype, 'oncomplete', { set(call) { "
    hold += "this.addEventListener('complete', () => window.held ? window.held.push(call) : call()); } });"
    page = open_page(stub_server.url)
    page.evaluate(hold)
    ask(page, "First")
    page.locator(".question .text", has_text="First").wait_for()
    assert page.locator(".send[type=submit]").count() == 0
    page.evaluate("() => { const calls = window.held; window.held = null; for (const call of calls) call(); }")
    assert answers(page) == [stub.answer]
    assert len(stub.requests) == 1


def test_an_answer_that_a_reload_cut_off_can_be_asked_again(page, stub):
    stub.held = HALF
    page.evaluate("() => { let now = Date.now(); Date.now = () => (now += 2000); }")  # each word is stored as it comes
    ask(page, "Slow?")
    page.locator(".answer > .text:visible").wait_for()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert "The connection ended" in page.locator(".notice").text_content()
    stub.held = None
    page.click("[data-key$=':retry']")
    page.locator(".stats").wait_for()
    assert answers(page) == [stub.answer]


def test_conversations_can_be_renamed_deleted_and_restored(page):
    ask_and_wait(page, "Old name")
    item = page.locator("#conversations li")
    item.hover()
    item.locator("[data-key$=':rename']").click()
    page.fill("#conversations input", "New name")
    page.keyboard.press("Enter")
    page.locator("#conversations .title", has_text="New name").wait_for()
    item.hover()
    item.locator("[data-key$=':remove']").click()
    page.locator("#conversations li").wait_for(state="detached")
    assert page.locator(".welcome").is_visible()
    page.click(".toast >> text=Undo")
    open_conversation(page, "New name")
    assert len(answers(page)) == 1


def test_a_conversation_that_is_deleted_while_it_is_answered_does_not_come_back(page, stub):
    stub.held = HALF
    ask(page, "Forget this")
    page.locator(".answer > .text:visible").wait_for()
    page.locator("#conversations li").hover()
    page.locator("#conversations [data-key$=':remove']").click()
    page.locator("#conversations li").wait_for(state="detached")
    assert page.locator(".welcome").is_visible()
    stub.held = None
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#conversations li").count() == 0


def test_an_export_can_be_imported_by_another_browser(open_page, page, stub, stub_server, tmp_path):
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "Keep this")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    content = json.loads(file.read_text())
    assert [record["title"] for record in content["conversations"]] == ["Keep this"]
    other = open_page(stub_server.url)
    other.set_input_files("#import-file", file)
    other.locator(".answer").wait_for()
    assert answers(other) == [stub.answer]
    ask_and_wait(other, "More")
    assert sent_images(stub.requests[-1]) == [scene()]
    content["conversations"][0]["nodes"][0]["role"] = "root"
    file.write_text(json.dumps(content))
    other.set_input_files("#import-file", file)
    other.locator(".toast", has_text="export.json is not a file that this page exported").wait_for()
    assert other.locator("#conversations li").count() == 1


def test_a_hostile_import_neither_hangs_the_page_nor_runs_anything(page, stub, tmp_path):
    ask_and_wait(page, "First")
    bad = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    circle = {
        "id": bad, "title": bad, "changed": 1, "images": [],
        "nodes": [
            {"id": '"]', "parent": "", "role": "user", "text": bad},
            {"id": "__proto__", "parent": '"]', "role": "assistant", "text": bad, "reasoning": bad, "model": bad,
             "end": bad, "error": bad},
        ],
        "selected": {"": '"]', '"]': "__proto__", "__proto__": '"]'},
    }  # fmt: skip
    itself = {**circle, "selected": {"": '"]', '"]': '"]'}}
    file = tmp_path / f"{bad.replace('/', '')[:40]}.json"
    for conversation in (circle, itself):
        file.write_text(json.dumps({"mmv": "conversations", "version": 1, "conversations": [conversation]}))
        page.set_input_files("#import-file", file)
        page.locator(".question .text", has_text="onerror").wait_for()
        page.reload()
        page.wait_for_selector("html[data-ready]")
    page.locator("#conversations .title", has_text="onerror").first.click()
    page.locator(".question .text", has_text="onerror").wait_for()
    ask_and_wait(page, "Second")
    assert page.evaluate("window.hacked") is None


def test_two_tabs_with_one_conversation_keep_what_either_asks(page, stub, stub_server):
    ask_and_wait(page, "First")
    other = page.context.new_page()
    other.goto(stub_server.url)
    open_conversation(other, "First")
    ask_and_wait(other, "Second")
    page.locator(".question .text", has_text="Second").wait_for()
    ask_and_wait(page, "Third")
    other.locator(".question .text", has_text="Third").wait_for()
    other.reload()
    other.locator(".question .text", has_text="Third").wait_for()
    assert other.locator(".question .text").all_text_contents() == ["First", "Second", "Third"]


def test_two_tabs_that_ask_at_once_keep_both_answers_whole(page, stub, stub_server):
    ask_and_wait(page, "First")
    other = page.context.new_page()
    other.goto(stub_server.url)
    open_conversation(other, "First")
    stub.held = HALF
    ask(page, "Second")
    other.locator(".question .text", has_text="Second").wait_for()
    ask(other, "Third")
    requested(page, stub, 3)
    stub.held = None
    for tab in (page, other):
        tab.locator(".question .text", has_text="Third").wait_for()
        tab.locator(".stats").nth(2).wait_for()
        assert answers(tab) == [stub.answer] * 3
    for tab in (page, other):  # not before: a tab that ends tells the other one nothing more
        tab.reload()
        tab.locator(".question .text", has_text="Third").wait_for()
        assert answers(tab) == [stub.answer] * 3


def test_without_storage_the_page_works_and_says_so(open_page, stub, stub_server):
    refuse = "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no', 'SecurityError'); } });"
    refuse += "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, "
    refuse += "{ get() { throw new DOMException('no', 'SecurityError'); } });"
    page = open_page(stub_server.url, init=refuse)
    assert "stores nothing" in page.locator("#memory-note").text_content()
    assert page.locator("#memory-note").is_visible()
    attach(page, ("a.png", scene()))
    assert ask_and_wait(page, "Hi") == stub.answer
    page.keyboard.press("Alt+n")
    open_conversation(page, "Hi")
    assert answers(page) == [stub.answer]


# --- a server that is busy, broken or gone ----------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(page, stub):
    stub.busy = 2
    ask(page, "Hi")
    page.locator(".status", has_text="The server is busy. Next try in 1 s").wait_for()
    page.locator(".stats").wait_for()
    assert answers(page) == [stub.answer]
    assert len(stub.requests) == 3


def test_an_error_in_the_answer_is_shown_with_what_had_come(page, stub):
    stub.error = "the model met a number that is not finite"
    ask_and_wait(page, "Hi")
    assert page.locator(".notice.problem").text_content() == stub.error
    assert stub.answer.startswith(answers(page)[0])


def test_an_answer_that_breaks_off_says_so_and_the_server_is_not_called_gone(page, stub):
    stub.breaks = True
    ask_and_wait(page, "Hi")
    assert "The connection ended" in page.locator(".notice.problem").text_content()
    page.wait_for_timeout(500)
    assert page.locator("#banner").text_content() == ""
    stub.breaks = False
    page.click("[data-key$=':retry']")
    page.locator(".versions", has_text="2/2").wait_for()
    assert answers(page) == [stub.answer]


def test_a_server_that_is_gone_is_said_and_found_again(page, stub, stub_server):
    stub.held = HALF
    ask(page, "Hi")
    page.locator(".answer > .text:visible").wait_for()
    stub_server.stop()
    page.locator("#banner", has_text="The server does not answer").wait_for()
    assert "The connection ended" in page.locator(".notice.problem").text_content()
    stub_server.start()
    page.locator(".toast", has_text="The server answers again.").wait_for()
    assert page.locator("#banner").text_content() == ""
    stub.held = None
    page.click("[data-key$=':retry']")
    page.locator(".stats").wait_for()
    assert answers(page) == [stub.answer]


def test_a_list_of_models_that_fails_is_asked_for_until_it_comes(page, stub, stub_server):
    stub.failures = 3
    page.goto(stub_server.url)
    page.locator(".toast", has_text="the list of models failed").wait_for()
    page.locator("#banner", has_text="The server does not answer").wait_for()
    page.locator(".toast", has_text="The server answers again.").wait_for()
    assert ask_and_wait(page, "Hi") == stub.answer
    assert page.locator("#banner").text_content() == ""


def test_a_server_that_began_anew_with_other_models_is_asked_for_them(page, stub, stub_server):
    ask_and_wait(page, "Hi")
    stub_server.stop()
    stub.models = {"another": ABILITIES}
    stub_server.start()
    ask_and_wait(page, "Again")
    assert "does not exist" in page.locator(".notice.problem").text_content()
    page.locator("#model option", has_text="another").wait_for(state="attached")
    page.locator("[data-key$=':retry']").last.click()
    page.locator(".stats").nth(1).wait_for()
    assert stub.requests[-1]["model"] == "another"


def test_a_server_that_works_is_not_asked_for_its_health(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    ask_and_wait(page, "Hi")
    page.wait_for_timeout(1500)
    assert [url for url in asked if "/health" in url] == []


# --- for everybody ----------------------------------------------------------------------------------------------------

UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, select, img, dialog, [role=region]")]
    .filter((element) => element.checkVisibility())
    .filter((element) => element.tagName === "IMG" ? !element.hasAttribute("alt")
        : !(element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.length
            || document.getElementById(element.getAttribute("aria-labelledby"))))
    .map((element) => element.outerHTML.slice(0, 120))"""
# The contrast of each visible text with what lies behind it, as WCAG 2 computes it.
PALE = """() => {
    const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
        return [...probe.getImageData(0, 0, 1, 1).data]; };
    const over = (top, under) => [0, 1, 2].map((i) => (top[i] * top[3] + under[i] * (255 - top[3])) / 255).concat(255);
    const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => { const v = c[i] / 255;
        return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
    const behind = (element) => { const layers = []; for (let e = element; e; e = e.parentElement) layers.unshift(e);
        const paint = (under, e) => over(rgba(getComputedStyle(e).backgroundColor), under);
        return layers.reduce(paint, [255, 255, 255, 255]); };
    const clear = (element) => { for (let e = element; e; e = e.parentElement)
        if (getComputedStyle(e).opacity < 1 || e.disabled || e.inert) return false; return true; };
    return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
        && !element.closest(".unseen, .skip") && clear(element)
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((element) => { const back = behind(element), ink = over(rgba(getComputedStyle(element).color), back);
            const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
            return [element.textContent.slice(0, 40), (a + 0.05) / (b + 0.05)]; })
        .filter(([, contrast]) => contrast < 4.5);
}"""
# Colours have changed, and what moves for a time has moved.
SETTLED = """() => Promise.allSettled(document.getAnimations()
    .filter(({ effect }) => effect.getComputedTiming().endTime < Infinity).map(({ finished }) => finished))"""
IDS = "() => [...document.querySelectorAll('[id]')].map(({ id }) => id)"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_every_control_has_a_name_and_every_text_has_contrast(open_page, stub, stub_server, theme, language):
    stub.reasoning, stub.dropped_turns, stub.finish = "Because.", 1, "length"
    page = open_page(stub_server.url, color_scheme=theme, locale=language)
    assert page.get_attribute("html", "lang") == language[:2]
    for prepare in (
        lambda: None,
        lambda: (attach(page, ("a.png", scene())), ask_and_wait(page, "What?"), page.click(".reasoning summary")),
        lambda: page.keyboard.press("Alt+s"),
        lambda: (page.keyboard.press("Escape"), page.keyboard.press("Alt+k")),
    ):
        prepare()
        assert page.evaluate(UNNAMED) == []
        page.evaluate(SETTLED)
        assert page.evaluate(PALE) == []
        ids = page.evaluate(IDS)
        assert len(ids) == len(set(ids))


def test_both_languages_have_the_same_sentences_and_the_page_uses_all_of_them(page):
    strings = page.evaluate("async () => (await import('/page/strings.js')).STRINGS")
    assert list(strings["en"]) == list(strings["zh"])
    for key, english in strings["en"].items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", strings["zh"][key])), key
    source = "".join(path.read_text() for path in PAGE.iterdir() if path.name != "strings.js")
    used = set(re.findall(r'\bt\(\s*"(\w+)"|data-(?:text|label)="(\w+)"', source))
    assert {first or second for first, second in used} <= set(strings["en"])
    derived = {f"set{name}{end}" for name in re.findall(r'\["\w+", "(\w+)", ', source) for end in ("", "Hint")}
    unused = [key for key in strings["en"] if f'"{key}"' not in source and key not in derived]
    assert unused == []


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_a_phone_never_scrolls_sideways(open_page, stub, stub_server, language):
    stub.answer = "long" * 60
    stub.models = {"a-model-with-a-very-long-name-of-many-words-and-numbers-1234567890": ABILITIES}
    options = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True, "locale": language}
    page = open_page(stub_server.url, **options)
    wide = "() => [document.documentElement.scrollWidth, document.getElementById('thread').scrollWidth]"
    assert max(page.evaluate(wide)) <= 360
    attach(page, *[(f"{number}.png", scene(number)) for number in range(5)])
    assert max(page.evaluate(wide)) <= 360
    ask_and_wait(page, "word" * 50)
    assert max(page.evaluate(wide)) <= 360
    page.tap("#toggle-history")
    assert page.locator("#conversations .title").is_visible()
    page.tap("#conversations .title")
    page.locator("#history").wait_for(state="hidden")
    page.tap("#open-settings")
    assert page.evaluate("() => document.getElementById('settings').scrollWidth") <= 360
    assert max(page.evaluate(wide)) <= 360


def test_the_keyboard_alone_reaches_all_shows_where_it_is_and_is_never_trapped(page, stub):
    attach(page, ("a.png", scene()))
    ask_and_wait(page, "What?")
    focused = """() => { const e = document.activeElement;  // the frame of a field is drawn around its form
        const style = getComputedStyle(e.tagName === "TEXTAREA" ? e.closest(".message-form") : e);
        const name = e.id || e.dataset.key || e.className || e.tagName;
        return [name, e === document.body || style.outlineStyle !== "none"]; }"""
    page.evaluate("() => document.activeElement.blur()")
    visited = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, is_visible = page.evaluate(focused)
        assert is_visible, name
        if name == "BODY" or (visited and name == visited[0]):
            break
        visited.append(name)
    else:
        pytest.fail("the focus never comes round")
    for name in ("new", "import", "export", "model", "theme", "language", "open-settings", "thread", "question"):
        assert name in visited
    actions = {name.split(":")[-1] for name in visited}
    assert actions >= {"open", "rename", "export", "remove", "edit", "retry", "copy", "choose", "camera"}
    page.locator("[data-key$=':retry']").focus()
    page.keyboard.press("Enter")
    page.locator(".answer .versions").wait_for()
    page.locator("[aria-label='Previous version']").focus()
    page.keyboard.press("Enter")
    page.locator(".versions", has_text="1/2").wait_for()
    page.keyboard.press("Enter")  # the focus went to the arrow that can be used
    page.locator(".versions", has_text="2/2").wait_for()
    page.keyboard.press("Alt+q")
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" Really?")
    page.keyboard.press("Enter")
    page.locator(".question .versions").wait_for()
    assert page.locator(".question .text").all_text_contents() == ["What? Really?"]
    answers(page)
    page.keyboard.press("Alt+k")
    keys, actions = (page.locator(f"#shortcuts {name}").all_text_contents() for name in ("dt", "dd"))
    assert (keys[1], actions[1]) == ("ShiftEnter", "New line")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+h")
    assert page.locator("#history").is_hidden()


def test_a_screen_reader_hears_the_finished_answer_and_not_each_word(page, stub):
    stub.held = HALF
    page.evaluate("""() => {
        const [announcer, spoken] = [document.getElementById("announcer"), (window.spoken = [])];
        new MutationObserver(() => spoken.push(announcer.textContent)).observe(announcer, { childList: true });
    }""")
    ask(page, "Hi")
    page.locator(".answer > .text:visible").wait_for()
    stub.held = None
    answers(page)
    assert page.evaluate("() => spoken") == [f"Answer: {stub.answer}"]
    assert page.locator("#thread").get_attribute("aria-live") is None


def test_the_theme_and_the_language_can_be_switched_and_are_kept(page):
    page.click("#theme")
    page.click("#theme")
    page.click("#language")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.get_attribute("html", "lang") == "zh"
    assert page.locator("#new").text_content() == "新对话"
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"


def test_nothing_moves_for_those_who_asked_for_that(open_page, stub, stub_server):
    stub.held = 0
    page = open_page(stub_server.url, reduced_motion="reduce")
    ask(page, "Hi")
    page.locator(".status .spinner").wait_for()
    assert page.evaluate("() => document.getAnimations().length") == 0


def test_two_conversations_can_be_answered_at_once(page, stub):
    stub.held = HALF
    ask(page, "First")
    page.locator(".answer").wait_for()
    page.keyboard.press("Alt+n")
    ask(page, "Second")
    page.locator(".question .text", has_text="Second").wait_for()
    requested(page, stub, 2)
    open_conversation(page, "First")
    assert page.locator(".question .text").all_text_contents() == ["First"]
    stub.held = None
    assert answers(page) == [stub.answer]
    open_conversation(page, "Second")
    assert answers(page) == [stub.answer]


def test_a_conversation_is_opened_as_it_is_then_not_as_it_was_listed(page, stub):
    stub.held = HALF
    ask(page, "First")
    page.locator(".answer").wait_for()
    page.locator("#conversations .title", has_text="First").wait_for()
    listed = page.evaluate_handle("() => document.querySelector('#conversations .title')")
    stub.held = None
    assert answers(page) == [stub.answer]
    page.keyboard.press("Alt+n")
    page.locator(".welcome").wait_for()
    listed.evaluate("(entry) => entry.click()")  # as in the moment before the list is shown anew
    page.locator("#title", has_text="First").wait_for(state="attached")
    assert answers(page) == [stub.answer]
