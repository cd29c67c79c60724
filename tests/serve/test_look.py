"""`POST /v1/look`: the trace of an answer, and the viewer that shows it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cli import harness
from tests.cli.harness import SIGHT, run_mmv, tiny_data
from tests.pages.browser import open_browser
from tests.serve.harness import QUESTION, image_item, text_item

PATCHES = 64  # of an image


@pytest.fixture(scope="module")
def picture():
    return tiny_data().picture().read_bytes()


def look(server, picture, content=None, **fields):
    content = content or [image_item(picture), text_item()]
    return server.request(
        "POST", "/v1/look", {"messages": [{"role": "user", "content": content}], "max_tokens": 8} | fields
    )


def test_a_trace_is_that_of_mmv_look(server, picture):
    response = look(server, picture)
    assert response.status == 200, response.body
    ended = run_mmv(
        "look", tiny_data().picture(), QUESTION, "--max-new-tokens", 8, "--json", "--model", harness.sighted(), *SIGHT
    )
    ours, expected = response.json, ended.json
    assert ours["model"] == "sft_vlm_128"
    for key in ("question", "answer", "images"):
        assert ours[key] == expected[key]
    assert ours["attention"].keys() == expected["attention"].keys()
    assert len(ours["tokens"]) == 8
    for token, other in zip(ours["tokens"], expected["tokens"], strict=True):
        assert token["text"] == other["text"]
        assert token["bits"] == pytest.approx(other["bits"], abs=1e-3)
        assert token["bits_blank"] == pytest.approx(other["bits_blank"], abs=1e-3)
    assert {name: variant["answer"] for name, variant in ours["variants"].items()} == {
        name: variant["answer"] for name, variant in expected["variants"].items()
    }


def test_a_given_answer_is_traced_with_patches_painted_over(server, picture):
    everywhere = [[0, patch] for patch in range(PATCHES)]
    trace = look(server, picture, answer="a red star", occlude=everywhere).json
    assert trace["answer"] == "a red star"
    assert trace["occluded"] == everywhere
    assert set(trace["variants"]) == {"blank", "occluded"}
    assert trace["variants"]["occluded"]["answer"] == trace["variants"]["blank"]["answer"]
    assert trace["variants"]["occluded"]["bits"] == trace["variants"]["blank"]["bits"]
    twice = look(server, picture, answer="a red star", occlude=[[0, 27], [0, 27]]).json
    assert twice["occluded"] == [[0, 27]]
    assert twice["variants"]["occluded"]["bits"] != twice["variants"]["blank"]["bits"]


def test_several_images_and_earlier_turns_are_traced(server, picture):
    other = tiny_data().picture(1).read_bytes()
    messages = [
        {"role": "user", "content": [image_item(picture), text_item("What is this?")]},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": [image_item(other), text_item("And this?")]},
    ]
    trace = server.request("POST", "/v1/look", {"messages": messages, "max_tokens": 4, "occlude": [[1, 0]]}).json
    assert trace["question"] == "And this?"
    assert len(trace["images"]) == 2
    assert trace["attention"]["patches"] == 2 * PATCHES


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": [{"role": "user", "content": "no image"}]}, "messages", "needs an image"),
        ({"occlude": [[0]]}, "occlude", "pairs"),
        ({"occlude": [[0, True]]}, "occlude", "pairs"),
        ({"occlude": "all"}, "occlude", "pairs"),
        ({"occlude": [[0, 64]]}, None, "patch 64 of image 0"),
        ({"occlude": [[-1, 0]]}, None, "cannot be painted"),
        ({"answer": 5}, "answer", "must be a text"),
        ({"answer": " "}, "answer", "the answer is empty"),
        ({"answer": "star " * 5000}, None, "there is room for"),
        ({"stream": True}, "stream", "does not take stream"),
        ({"temperature": 1.0}, "temperature", "does not take temperature"),
        ({"answers": "a"}, "answers", "unknown field"),
        ({"think": True}, "think", "does not reason"),
    ],
)
def test_what_cannot_be_traced_is_refused(server, picture, fields, param, message):
    response = look(server, picture, **fields)
    assert response.status == 400
    assert response.error["param"] == param
    assert message in response.error["message"]
    assert server.request("GET", "/health").status == 200


def test_an_unknown_model_and_another_method_are_refused(server, picture):
    assert look(server, picture, model="none").status == 404
    assert server.request("GET", "/v1/look").status == 405


def test_looks_and_chats_side_by_side_give_what_they_give_alone(server, picture):
    alone = look(server, picture, max_tokens=24).json
    answer = server.answer([text_item(), image_item(picture)], max_tokens=24)
    with ThreadPoolExecutor(8) as pool:
        traces = [pool.submit(look, server, picture, max_tokens=24) for _ in range(3)]
        chats = [pool.submit(server.answer, [text_item(), image_item(picture)], max_tokens=24) for _ in range(5)]
        assert [trace.result().json for trace in traces] == [alone] * 3
        assert [chat.result() for chat in chats] == [answer] * 5


def probes_often():
    from minimind_v.core.serve import protocol

    protocol.PROBE_SECONDS = 0.02  # so that the trace is not done before


def test_a_client_that_is_gone_ends_its_trace(start, picture):
    server = start(prepare=probes_often)
    content = [image_item(picture), text_item()]
    fields = {"messages": [{"role": "user", "content": content}], "max_tokens": 1000, "answer": "a red star " * 300}
    body = json.dumps(fields).encode()
    cancelled = server.metric("mmv_requests_cancelled_total")
    head = f"POST /v1/look HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with server.connect() as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        end = time.monotonic() + harness.PATIENCE
        while not server.metric("mmv_requests_queued"):
            assert time.monotonic() < end
    while server.metric("mmv_requests_cancelled_total") == cancelled or server.metric("mmv_requests_queued"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert look(server, picture).status == 200


# --- the viewer -------------------------------------------------------------------------------------------------------

MOUNT = """async (body) => {
  document.body.replaceChildren();
  const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: "/page/look.css" });
  document.head.append(style);
  const ask = async (more) => {
    const options = { method: "POST", headers: { "content-type": "application/json" } };
    const response = await fetch("/v1/look", { ...options, body: JSON.stringify({ ...body, ...more }) });
    if (!response.ok) throw new Error((await response.json()).error.message);
    return response.json();
  };
  const { mount } = await import("/page/look.js");
  window.trace = await ask({});
  window.results = [];
  mount(document.body, window.trace, { language: "en", ask: async (more) => {
    const result = await ask(more);
    window.results.push([more, result]);
    return result;
  } });
}"""


def until(page, condition):
    """Wait for a condition; the page's policy allows none of Playwright's own ways."""
    end = time.monotonic() + harness.PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


@pytest.mark.long
def test_painting_with_the_mouse_asks_again_and_shows_the_new_answer(server, picture):
    """Under the policy of the server's own page, which allows no inline style."""
    messages = [{"role": "user", "content": [image_item(picture), text_item()]}]
    with open_browser() as page:
        page.goto(f"{server.url}/health")
        page.evaluate(MOUNT, {"messages": messages, "max_tokens": 8})
        box = page.locator(".mmv-look .pad").bounding_box()
        for number, (x, y) in enumerate([(1.5, 1.5), (3.5, 1.5), (3.5, 3.5)]):
            page.mouse.move(box["x"] + box["width"] * x / 8, box["y"] + box["height"] * y / 8, steps=8)
            if not number:
                page.mouse.down()
        page.mouse.up()
        until(page, "results.length === 1")
        more, result = page.evaluate("results[0]")
        assert "answer" not in more, "the model's own answer is meant"
        assert result["answer"] == page.evaluate("trace.answer")
        assert more["occlude"] == [[0, patch] for patch in (9, 10, 11, 19, 27)]
        painted = page.locator(".mmv-look tr.painted")
        until(page, "document.querySelector('.painted td.value')?.textContent")
        assert painted.locator("td").first.inner_text().strip() == (
            result["variants"]["occluded"]["answer"].strip() or "(nothing)"
        )
        change = sum(result["variants"]["occluded"]["bits"]) - sum(token["bits"] for token in result["tokens"])
        shown = painted.locator("td").nth(1).inner_text().replace("−", "-")
        assert float(shown) == pytest.approx(change, abs=0.06)
        page.get_by_role("button", name="Clear").click()
        painted.wait_for(state="detached")
        page.locator(".mmv-look .pad").focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowRight", "Space"):
            page.keyboard.press(key)
        until(page, "results.length === 2")
        assert page.evaluate("results[1][0].occlude") == [[0, 9]]
        assert page.errors == []
