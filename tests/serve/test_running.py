"""A server over time: clients that leave or read slowly, a full queue, several models, signals, keys, logs."""

import io
import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import pytest
from PIL import Image

from minimind_v.core.serve.models import Models
from tests.cli import harness
from tests.cli.harness import run_mmv
from tests.serve.harness import QUESTION, Server, image_item, raw_request, text_item
from tests.serve.soak import soak

pytestmark = pytest.mark.long
LONG = {"temperature": 2, "top_p": 1, "seed": 3, "max_tokens": 3000}


def long_body(**fields):
    return json.dumps({"messages": [{"role": "user", "content": QUESTION}]} | LONG | fields).encode()


def patiently(happened, seconds=20):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def limits(**changes):
    """Change the limits of servers of this process."""
    from minimind_v.core.serve.limits import Limits

    names = list(Limits.__dataclass_fields__)
    defaults = zip(names, Limits.__init__.__defaults__, strict=True)
    Limits.__init__.__defaults__ = tuple(changes.get(name, default) for name, default in defaults)


def draws_forever():
    """Answers do not end before their limit: the end token has no probability."""
    from minimind_v.core.generate import engine

    take = engine.Answer.__init__

    def begin(self, *arguments):
        take(self, *arguments)
        self._eos_id = -1

    engine.Answer.__init__ = begin


def one_at_a_time():
    """Two accepted requests, of which one is answered at a time."""
    from minimind_v.core.generate import engine

    draws_forever()
    limits(requests=2)
    begin = engine.Engine.__init__

    def with_one_row(self, model, tokenizer, context=4096, most_rows=16):
        begin(self, model, tokenizer, context, most_rows)
        self.most_rows = 1

    engine.Engine.__init__ = with_one_row


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(start, stream):
    server = start(prepare=draws_forever)
    with server.connect() as connection:
        connection.sendall(raw_request(long_body(stream=stream)))
        patiently(lambda: server.metric("mmv_requests_active") == 1)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    patiently(lambda: server.metric("mmv_requests_active") == 0)
    patiently(lambda: server.metric("mmv_requests_cancelled_total") == 1)
    tokens = server.metric("mmv_completion_tokens_total")
    time.sleep(0.3)
    assert server.metric("mmv_completion_tokens_total") == tokens  # the engine works no longer


def probes_often():
    from minimind_v.core.serve import protocol

    protocol.PROBE_SECONDS = 0.02
    draws_forever()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_no_more_and_waits_is_not_a_client_that_leaves(start, stream):
    server = start(prepare=probes_often)
    with server.connect() as waiting:
        leaving = server.connect()
        for connection, tokens in ((waiting, 60), (leaving, 3000)):
            connection.sendall(raw_request(long_body(stream=stream, max_tokens=tokens)))
            connection.shutdown(socket.SHUT_WR)
        leaving.close()
        response = HTTPResponse(waiting)
        response.begin()  # which skips what says nothing but that the answer is on its way
        assert response.status == 200
        body = response.read()
    assert b"[DONE]" in body if stream else json.loads(body)["usage"]["completion_tokens"] == 60
    patiently(lambda: server.metric("mmv_requests_cancelled_total") == 1)


def test_a_full_queue_refuses_and_says_when_to_come_again(start):
    server = start(prepare=one_at_a_time)
    connections = [server.connect() for _ in range(2)]
    for connection in connections:
        connection.sendall(raw_request(long_body(stream=True)))
    patiently(lambda: server.metric("mmv_requests_active") == 2)
    response = server.chat()
    assert response.status == 429
    assert response.error["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    for connection in connections:
        connection.close()
    patiently(lambda: server.metric("mmv_requests_active") == 0)
    assert server.chat().status == 200


def slow_readers_are_ended():
    draws_forever()
    limits(write_seconds=1.0)


def test_a_client_that_reads_nothing_delays_nobody_and_is_ended(start):
    server = start(prepare=slow_readers_are_ended)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        connection.sendall(raw_request(long_body(stream=True, logprobs=True, top_logprobs=20)))
        patiently(lambda: server.metric("mmv_requests_active") == 1)
        assert server.chat(max_tokens=8).status == 200
        patiently(lambda: server.metric("mmv_requests_active") == 0, 60)
    assert server.metric("mmv_requests_cancelled_total") == 1


def short_time():
    draws_forever()
    limits(answer_seconds=2.0)


def test_an_answer_that_takes_too_long_is_ended_with_an_error(start):
    server = start(prepare=short_time)
    response = server.chat(**LONG)
    assert response.status == 503
    assert response.error["code"] == "timeout"
    events = server.chat(**LONG, stream=True).body.decode().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert "choices" in json.loads(events[-3].removeprefix("data: "))
    patiently(lambda: server.metric("mmv_requests_active") == 0)


# --- the end ----------------------------------------------------------------------------------------------------------


def pauses():
    """Answers do not go on while there is a file at PAUSED."""
    from minimind_v.core.generate import engine

    draws_forever()
    step = engine.Engine.step

    def step_unless_paused(self):
        while self._answers and Path(os.environ["PAUSED"]).exists():
            time.sleep(0.01)
        return step(self)

    engine.Engine.step = step_unless_paused


def test_the_first_signal_lets_answers_finish_and_accepts_no_others(start, tmp_path, monkeypatch):
    paused = tmp_path / "paused"
    paused.touch()
    monkeypatch.setenv("PAUSED", str(paused))
    server = start(prepare=pauses)
    with ThreadPoolExecutor() as pool, server.connect() as kept:
        answer = pool.submit(server.chat, **LONG | {"max_tokens": 50})
        patiently(lambda: server.metric("mmv_requests_active") == 1)
        server.running.send(signal.SIGTERM)
        patiently(lambda: server.request("GET", "/health").status == 503)
        patiently(lambda: "finishing 1 answer; a second signal ends at once" in server.log)
        kept.sendall(raw_request(long_body()))
        assert kept.recv(1000).startswith(b"HTTP/1.1 503 ")
        paused.unlink()
        assert answer.result().json["usage"]["completion_tokens"] == 50
    assert server.running.wait().code == 0


def waits_for_ever():
    limits(drain_seconds=1e6, keep_alive_seconds=1e6)


def test_an_idle_server_ends_at_once(start):
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        server = start(prepare=waits_for_ever)
        with server.connect():
            server.running.send(number)
            assert server.running.wait().code == code
        assert "Traceback" not in server.log


def test_the_second_signal_ends_at_once(start):
    server = start(prepare=draws_forever)
    with server.connect() as connection:
        connection.sendall(raw_request(long_body()))
        patiently(lambda: server.metric("mmv_requests_active") == 1)
        server.running.send(signal.SIGTERM)
        time.sleep(0.3)
        assert server.running.alive
        server.running.send(signal.SIGTERM)
        assert server.running.wait().code == 128 + signal.SIGTERM


def short_drain():
    draws_forever()
    limits(drain_seconds=0.5)


def test_answers_that_do_not_finish_in_time_do_not_keep_the_server(start):
    server = start(prepare=short_drain)
    with server.connect() as connection:
        connection.sendall(raw_request(long_body(stream=True)))
        patiently(lambda: server.metric("mmv_requests_active") == 1)
        server.running.send(signal.SIGTERM)
        assert server.running.wait().code == 0


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder of three models that can be opened, a text-only base, and a damaged file."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sft_vlm_128", "pretrain_vlm_128", "sft_vlm_128_copy"):
        for ending in (".pth", ".json"):
            shutil.copy(harness.sighted().with_suffix(ending), out / f"{name}{ending}")
    shutil.copy(harness.BASE, out / "lm_128.safetensors")
    (out / "sft_vlm_7.pth").write_bytes(b"PK\x03\x04 damaged")
    return out


def test_the_models_of_a_folder_are_loaded_when_they_are_asked_for(start, folder):
    server = start(model=folder)
    models = server.request("GET", "/v1/models").json["data"]
    names = ["pretrain_vlm_128", "sft_vlm_128", "sft_vlm_128_copy", "sft_vlm_7"]
    assert sorted(model["id"] for model in models) == names
    assert [model["mmv"]["loaded"] for model in models] == [False] * 4
    good = next(model["mmv"] for model in models if model["id"] == "sft_vlm_128")
    assert good == {"format": "pth", "loaded": False, "thinks": False, "images": True, "context": 4096, "stage": "sft",
                    "parameters": 880896, "generation": "2025", "tokens_per_image": 64}  # fmt: skip
    [unreadable] = [model["mmv"] for model in models if model["id"] == "sft_vlm_7"]
    assert unreadable.keys() == good.keys()
    broken = server.chat(model="sft_vlm_7")
    assert broken.status == 503
    assert broken.error["code"] == "model_unavailable"
    assert str(folder) not in broken.error["message"]
    assert "sft_vlm_7 cannot be opened" in server.log
    assert server.chat(model="sft_vlm_128.pth").json["model"] == "sft_vlm_128"
    for name in ("sft_vlm_128", "pretrain_vlm_128", "sft_vlm_128_copy"):
        assert server.chat(model=name).json["model"] == name
    assert server.metric("mmv_models_loaded") == 2  # the first one was dropped
    loaded = {model["id"]: model["mmv"]["loaded"] for model in server.request("GET", "/v1/models").json["data"]}
    assert [name for name, is_loaded in loaded.items() if is_loaded] == ["pretrain_vlm_128", "sft_vlm_128_copy"]
    assert server.chat(model="sft_vlm_128").status == 200


def test_a_checkpoint_and_its_converted_copies_are_marked(tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "model.gguf").write_bytes(b"GGUF")
    for name in ("sft_vlm_128.pth", "sft_vlm_128.safetensors", "small.gguf"):
        (tmp_path / name).write_bytes(b"")
    entries = Models([tmp_path]).entries
    formats = {"exported": "transformers", "llama": "gguf", "sft_vlm_128": "pth", "small": "gguf"}
    formats["sft_vlm_128.safetensors"] = "safetensors"
    assert {name: entry.format for name, entry in entries.items()} == formats


def test_requests_for_a_model_that_is_being_loaded_wait_for_the_same_load(start, folder):
    server = start("--model", harness.sighted(), model=folder / "pretrain_vlm_128.pth")
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: server.chat(model="pretrain_vlm_128"), range(6)))
    assert {response.status for response in responses} == {200}
    assert server.metric("mmv_models_loaded") == 1


def test_names_are_unique(tmp_path):
    from minimind_v.core.serve.models import named

    for name in ("a/x.pth", "a/x.safetensors", "b/x.pth", "c/y.pth"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list(named([tmp_path / "a"])) == ["x", "x.safetensors"]
    paths = [tmp_path / name for name in ("a/x.pth", "b", "c", "a/x.safetensors", "b/../b2/x.pth")]
    (tmp_path / "b2").mkdir()
    (tmp_path / "b2" / "x.pth").touch()
    assert list(named(paths)) == ["a/x", "b/x", "y", "a/x.safetensors", "b2/x"]


def test_names_of_two_folders_tell_the_folders_apart(tmp_path):
    from minimind_v.core.serve.models import named

    for name in ("demo/out/x.pth", "demo-3v/out/x.pth", "demo-3v/out/x.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = named([tmp_path / "demo" / "out", tmp_path / "demo-3v" / "out"])
    assert list(names) == ["demo/out/x", "demo-3v/out/x", "demo-3v/out/x.safetensors"]
    assert names["demo/out/x"] == tmp_path / "demo" / "out" / "x.pth"


def test_a_single_model_that_cannot_be_opened_ends_the_command(tmp_path):
    weights = tmp_path / "sft_vlm_7.pth"
    weights.write_bytes(b"PK\x03\x04 damaged")
    ended = run_mmv("serve", "--model", weights, *harness.SIGHT, "--port", 0)
    assert ended.code == 1
    assert str(weights) in ended.error
    assert "no weights at" in run_mmv("serve", "--model", tmp_path / "none.pth", "--port", 0).error


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_other_machines_need_a_key(monkeypatch):
    ended = run_mmv("serve", "--host", "0.0.0.0", "--model", harness.sighted(), *harness.SIGHT)
    assert ended.code == 2
    assert "--api-key" in ended.error


@pytest.mark.parametrize("key", ["", " ", "key "])
def test_a_key_that_no_request_can_give_is_refused(key):
    ended = run_mmv("serve", "--api-key", key, "--model", harness.sighted(), *harness.SIGHT)
    assert ended.code == 2
    assert "--api-key is empty, or has spaces around it" in ended.error


def test_a_key_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MMV_API_KEY", "sésame")
    server = Server(tmp_path / "keyed", "--host", "0.0.0.0")
    try:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sésame".encode().decode("latin-1")}):
            response = server.request("POST", "/v1/chat/completions", {}, **headers)
            assert response.status == 401
            assert response.error["code"] == "invalid_api_key"
        assert server.request("GET", "/metrics").status == 401
        assert server.request("GET", "/health", host="anything.example").status == 200
        key = {"authorization": "Bearer " + "sésame".encode().decode("latin-1")}
        assert server.request("GET", "/v1/models", **key).status == 200
        assert "sésame" not in server.log
    finally:
        server.end()


def test_a_port_that_is_in_use_is_reported(server):
    ended = run_mmv("serve", "--port", server.port, "--model", harness.sighted(), *harness.SIGHT)
    assert ended.code == 1
    assert f"cannot listen at 127.0.0.1:{server.port} (Address already in use) — choose another --port" in ended.error


def test_the_page_can_be_left_out(start):
    server = start("--no-page")
    assert server.request("GET", "/").status == 404
    assert server.request("GET", "/v1/examples").status == 404
    assert server.chat().status == 200


def test_examples_are_images_of_the_demo_with_their_answers(server):
    examples = server.request("GET", "/v1/examples").json["examples"]
    assert len(examples) == 6
    for example in examples:
        image = server.request("GET", example["image"])
        assert image.headers["content-type"] == "image/png"
        assert server.answer([image_item(image.body, "image/png"), text_item(example["question"])])
        assert example["answer"]
    assert server.request("GET", "/page/examples/none.png").status == 404


# --- records ----------------------------------------------------------------------------------------------------------


def test_the_access_log_has_a_json_line_for_each_request_and_no_text(start):
    server = start("--log", "json", "--model", harness.BASE)
    tokens = server.chat("my secret question").json["usage"]["completion_tokens"]
    server.request("GET", "/nothing%0aforged?key=hidden")
    patiently(lambda: server.log.count("\n") >= 3)
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    server.chat(model="lm_128")
    patiently(lambda: "lm_128 cannot be opened" in server.log)
    assert all(json.loads(line)["time"] for line in server.log.splitlines()[1:])
    chat = lines[0]
    assert (chat["method"], chat["path"], chat["status"]) == ("POST", "/v1/chat/completions", 200)
    assert chat["model"] == "sft_vlm_128"
    assert chat["completion_tokens"] == tokens
    assert chat["seconds"] > 0
    assert lines[1]["status"] == 404
    assert "secret" not in server.log
    assert "hidden" not in server.log


def test_metrics_are_in_the_text_form_of_prometheus(start):
    server = start()
    tokens = server.chat().json["usage"]["completion_tokens"]
    server.chat(n=2)
    text = server.request("GET", "/metrics").body.decode()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.rsplit(" ", 1)[1].replace(".", "").isdigit() for line in samples)
    assert 'mmv_requests_total{path="/v1/chat/completions",code="200"} 1' in samples
    assert 'mmv_requests_total{path="/v1/chat/completions",code="400"} 1' in samples
    assert "mmv_first_token_seconds_count 1" in samples
    assert 'mmv_request_seconds_bucket{le="+Inf"} 1' in samples
    assert server.metric("mmv_completion_tokens_total") == tokens


def test_memory_of_bodies_is_bounded_together(start):
    server = start(prepare=little_memory)
    body = b" " * 900_000

    def refused():
        """Whether a body is refused beside three that are not complete; the server may refuse one of these instead."""
        held = [server.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(raw_request(body)[:-10])
        status = server.request("POST", "/v1/chat/completions", body).status
        for connection in held:
            connection.close()
        return status == 429

    patiently(refused)
    patiently(lambda: server.chat([text_item("x" * 100_000)]).status != 429)


def little_memory():
    limits(bodies=3_000_000)


def test_images_are_decoded_while_others_are_answered(start):
    server = start()
    file = io.BytesIO()
    Image.effect_noise((3000, 3000), 90).save(file, "PNG", compress_level=1)
    item = image_item(file.getvalue())
    heavy = threading.Thread(target=server.chat, args=[[*[item] * 2, text_item()]])
    heavy.start()
    queued = partial(server.metric, "mmv_requests_queued")
    patiently(lambda: queued() == 1 and server.request("GET", "/health").status == 200 and queued() == 1)
    heavy.join()


def test_web_opens_the_page_in_a_browser(tmp_path, monkeypatch):
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    running = harness.Running(tmp_path, "web", "--model", harness.sighted(), *harness.SIGHT, "--port", 0)
    try:
        running.until(lambda: opened.exists() and opened.read_text())
        assert opened.read_text().strip() in running.err
    finally:
        assert running.send(signal.SIGTERM).wait().code == 0


def test_an_error_inside_an_answer_is_logged_and_not_told(start):
    server = start(prepare=breaks_in_the_engine)
    response = server.chat()
    assert response.status == 500
    assert "secret reason" not in response.error["message"]
    assert "ZeroDivisionError: secret reason" in server.log
    assert server.request("GET", "/health").status == 200


def breaks_in_the_engine():
    from minimind_v.core.serve import answers

    def broken(*arguments):
        raise ZeroDivisionError("secret reason")

    answers.Sampler = lambda sampling: broken


def test_a_short_siege_loses_nothing(tmp_path):
    report = soak(tmp_path, clients=12, seconds=5)
    assert report.counts["cut"]
    assert report.counts["refused"]
