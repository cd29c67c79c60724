"""The page in a browser, with `mmv serve` and a small model behind it."""

import base64
import signal

import pytest
from PIL import Image

from tests.cli.harness import ROOT
from tests.serve.harness import QUESTION
from tests.serve.page_actions import answers, ask, ask_and_wait, attach, scene
from tests.serve.screenshots import shots

pytestmark = pytest.mark.long


def choose_greedy(page, max_tokens):
    page.keyboard.press("Alt+s")
    page.fill("#set-temperature", "0")
    page.fill("#set-max_tokens", str(max_tokens))
    page.keyboard.press("Escape")


def asked_directly(server, question, *images, max_tokens):
    """The text and the number of tokens that a program gets from the server."""
    addresses = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images]
    content = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    direct = server.chat([*content, {"type": "text", "text": question}], max_tokens=max_tokens).json
    return direct["choices"][0]["message"]["content"], direct["usage"]["completion_tokens"]


@pytest.mark.parametrize("numbers", [(1,), (2, 3)], ids=["one image", "two images"])
def test_what_stands_on_the_page_is_what_the_server_gives_a_program(open_page, server, numbers):
    page = open_page(server.url)
    choose_greedy(page, 24)
    images = [scene(number) for number in numbers]
    attach(page, *[(f"{number}.png", data) for number, data in zip(numbers, images, strict=True)])
    shown = ask_and_wait(page, QUESTION)
    text, tokens = asked_directly(server, QUESTION, *images, max_tokens=24)
    assert shown == text
    assert page.locator(".stats").text_content().startswith(f"{tokens} token")


def test_a_click_on_an_example_asks_its_question_about_its_image(open_page, server):
    for locale in ("en-US", "zh-CN"):
        page = open_page(server.url, locale=locale)
        questions = page.locator(".card").all_text_contents()
        assert [question.isascii() for question in questions] == [locale == "en-US"] * 3
        choose_greedy(page, 8)
        page.locator(".card").first.click()
        page.locator(".stats").wait_for()
        assert page.locator(".question .text").text_content() == questions[0]
        assert page.locator(".question .image").count() == 1


def test_looking_inside_shows_the_tokens_of_the_answer_on_the_page(open_page, server):
    page = open_page(server.url)
    choose_greedy(page, 8)
    attach(page, ("a.png", scene()))
    answer = ask_and_wait(page, QUESTION)
    page.click("[data-key$=':look']")
    page.locator("#look .chip").first.wait_for()
    tokens = "".join(page.locator("#look .chip").all_text_contents())
    assert "".join(tokens.split()).startswith("".join(answer.split()))
    page.keyboard.press("Escape")
    assert page.locator("#look").is_hidden()


def test_later_questions_follow_cut_answers(open_page, server):
    page = open_page(server.url)
    choose_greedy(page, 4)
    for question in ("One?", "Two?", "Three?"):
        ask_and_wait(page, question)
    assert page.locator(".notice.problem").count() == 0
    assert page.locator(".answer").count() == 3


def test_an_answer_that_was_stopped_leaves_the_server_free(open_page, start):
    server = start()
    page = open_page(server.url)
    server.running.send(signal.SIGSTOP)
    ask(page, QUESTION)
    page.locator(".status").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".notice").text_content() == "Stopped."
    server.running.send(signal.SIGCONT)
    choose_greedy(page, 4)
    ask_and_wait(page, "And now?")
    assert page.locator(".notice.problem").count() == 0


def test_the_server_refuses_and_the_page_says_why(open_page, server):
    page = open_page(server.url)
    ask_and_wait(page, "word " * 5000)
    assert "tokens" in page.locator(".notice.problem").text_content()


def test_a_killed_server_is_found_again_and_the_question_is_asked_again(open_page, start):
    server = start()
    page = open_page(server.url)
    server.running.send(signal.SIGSTOP)  # its answer never comes
    ask(page, QUESTION)
    page.locator(".status", has_text="The model is reading").wait_for()
    server.end()
    page.locator("#banner", has_text="The server does not answer").wait_for()
    assert "The connection ended" in page.locator(".notice.problem").text_content()
    server = start(port=server.port)
    page.locator(".toast", has_text="The server answers again.").wait_for(timeout=60_000)
    choose_greedy(page, 8)
    page.click("[data-key$=':retry']")
    page.locator(".stats").wait_for()
    assert answers(page) == [asked_directly(server, QUESTION, max_tokens=8)[0]]


def test_a_server_with_a_key_gives_the_page_and_answers_with_the_key_only(browser, start):
    server = start("--api-key", "secret-key")
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(server.url)
    page.fill("#key-input", "secret-key")
    page.press("#key-input", "Enter")
    page.locator("#model option").first.wait_for(state="attached")
    choose_greedy(page, 4)
    ask_and_wait(page, "Hi")
    assert page.locator(".notice.problem").count() == 0
    context.close()


def test_the_images_of_the_docs_can_be_made_again_and_are_small(browser, server, tmp_path):
    names = sorted(path.name for path in shots(browser, server.url, tmp_path))
    assert names == ["page-dark-zh-phone.png", "page-light.png"]
    for name in names:
        assert Image.open(ROOT / "docs" / "images" / name).size == Image.open(tmp_path / name).size
        assert (ROOT / "docs" / "images" / name).stat().st_size < 150_000
