"""The page in a browser, with `mmv serve` and a small model behind it."""

import base64
import signal
import subprocess
import sys

import httpx
import pytest
from PIL import Image

from tests.cli.harness import ROOT, SIGHT, sighted
from tests.serve.page_actions import answers, ask, ask_and_wait, attach, scene, start_server

pytestmark = pytest.mark.long
QUESTION = "What colour is the circle?"


def start(folder, *options):
    return start_server(folder, sighted(), *SIGHT, *options)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    server, url = start(tmp_path_factory.mktemp("serve"))
    yield url
    server.send(signal.SIGKILL).process.wait()


def choose_greedy(page, max_tokens):
    page.keyboard.press("Alt+s")
    page.fill("#set-temperature", "0")
    page.fill("#set-max_tokens", str(max_tokens))
    page.keyboard.press("Escape")


def asked_directly(url, question, *images, **options):
    """The answer that a program gets from the server."""
    addresses = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in images]
    content = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    body = {"model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"], "messages": messages, **options}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("numbers", [(1,), (2, 3)], ids=["one image", "two images"])
def test_what_stands_on_the_page_is_what_the_server_tells_a_program(open_page, address, numbers):
    page = open_page(address)
    choose_greedy(page, 24)
    images = [scene(number) for number in numbers]
    attach(page, *[(f"{number}.png", data) for number, data in zip(numbers, images, strict=True)])
    shown = ask_and_wait(page, QUESTION)
    direct = asked_directly(address, QUESTION, *images, temperature=0, max_tokens=24)
    assert shown == direct["choices"][0]["message"]["content"]
    tokens = direct["usage"]["completion_tokens"]
    assert page.locator(".stats").text_content().startswith(f"{tokens} tokens · ")


def test_later_questions_follow_a_stopped_and_an_empty_answer(open_page, address):
    page = open_page(address)
    choose_greedy(page, 4)
    for question in ("One?", "Two?", "Three?"):
        ask_and_wait(page, question)
        assert page.locator(".notice.problem").count() == 0
    assert page.locator(".answer").count() == 3


def test_the_server_refuses_and_the_page_says_why(open_page, address):
    page = open_page(address)
    ask_and_wait(page, "word " * 5000)
    assert "tokens" in page.locator(".notice.problem").text_content()


def test_a_killed_server_is_found_again_and_the_question_is_asked_again(open_page, tmp_path):
    server, url = start(tmp_path / "first")
    page = open_page(url)
    server.send(signal.SIGSTOP)  # its answer never comes
    ask(page, QUESTION)
    page.locator(".status", has_text="The model is reading").wait_for()
    server.send(signal.SIGKILL).process.wait()
    page.locator("#banner", has_text="The server does not answer").wait_for()
    assert "The connection ended" in page.locator(".notice.problem").text_content()
    server, _ = start(tmp_path / "second", "--port", url.rpartition(":")[2])
    page.locator(".toast", has_text="The server answers again.").wait_for(timeout=60_000)
    choose_greedy(page, 8)
    page.click("[data-key$=':retry']")
    page.locator(".stats").wait_for()
    direct = asked_directly(url, QUESTION, temperature=0, max_tokens=8)
    assert answers(page) == [direct["choices"][0]["message"]["content"]]
    server.send(signal.SIGKILL).process.wait()


def test_a_server_with_a_key_gives_the_page_and_answers_with_the_key_only(browser, tmp_path):
    server, url = start(tmp_path, "--api-key", "secret-key")
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(url)
    page.fill("#key-input", "secret-key")
    page.press("#key-input", "Enter")
    page.locator("#model option[value]").first.wait_for(state="attached")
    choose_greedy(page, 4)
    ask_and_wait(page, "Hi")
    assert page.locator(".notice.problem").count() == 0
    context.close()
    server.send(signal.SIGKILL).process.wait()


def test_the_images_of_the_docs_can_be_made_again_and_are_small(browser, tmp_path):
    code = "import sys; from pathlib import Path; from tests.cli.harness import ROOT, SIGHT, sighted; "
    code += "from tests.serve.screenshots import shoot; shoot(sighted(), Path(sys.argv[1]), *SIGHT)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=ROOT)  # a browser of its own
    made_again = sorted(path.name for path in tmp_path.iterdir())
    assert made_again == ["page-dark-zh-phone.png", "page-light.png"]
    for name in made_again:
        assert Image.open(ROOT / "docs" / "images" / name).size == Image.open(tmp_path / name).size
        assert (ROOT / "docs" / "images" / name).stat().st_size < 150_000
