"""The pages on the server: their commands run as they are written, in a folder as the demo leaves it."""

import json
import re
import subprocess

import pytest

from minimind_v.core.serve.limits import Limits
from tests.cli import harness
from tests.cli.harness import ROOT
from tests.demo_folder import demo_folder

ENGLISH, CHINESE = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("serve.md", "serve_zh.md"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.long
def test_every_command_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    folder = demo_folder(tmp_path / "demo")
    monkeypatch.chdir(folder)
    servers, ports, outputs = [], {}, []
    try:
        for block in blocks(ENGLISH, "bash"):
            if block.startswith("mmv "):
                options, port = block.split()[1:], "8000"
                if "--port" in options:
                    port = options[options.index("--port") + 1]
                    del options[options.index("--port") :]
                servers.append(harness.Running(tmp_path / port, *options, "--port", "0"))
                servers[-1].until(lambda: "serving at http://" in servers[-1].err)
                ports[port] = re.search(r"127\.0\.0\.1:(\d+)", servers[-1].err)[1]
                continue
            for port, free in ports.items():
                block = block.replace(f":{port}/", f":{free}/")
            done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True, check=False)
            assert done.returncode == 0, block
            outputs.append(done.stdout)
        answers = [json.loads(output)["choices"][0]["message"]["content"] for output in outputs[:2]]
        assert all(answers)
        assert {model["id"] for model in json.loads(outputs[2])["data"]} == {"sft_vlm_128", "pretrain_vlm_128"}
        assert '"status":"ok"' in outputs[3]
        assert 'mmv_requests_total{path="/v1/chat/completions",code="200"} 2' in outputs[3]
        [program] = blocks(ENGLISH, "python")
        exec(compile(program.replace(":8000/", f":{ports['8000']}/"), "docs/serve.md", "exec"), {})
        assert capsys.readouterr().out
    finally:
        for server in servers:
            server.send(harness.signal.SIGTERM)
        assert [server.wait().code for server in servers] == [0] * len(servers)


def test_both_languages_give_the_same_commands():
    for language in ("bash", "python"):
        assert blocks(ENGLISH, language) == blocks(CHINESE, language)


def test_the_limits_are_those_of_the_server():
    limits = Limits()
    for page in (ENGLISH, CHINESE):
        for number in (limits.body >> 20, limits.messages, f"{limits.text:,}", limits.images, limits.image_bytes >> 20,
                       limits.requests, f"{limits.answer_seconds:g}", limits.connections,
                       f"{limits.read_seconds:g}"):  # fmt: skip
            assert re.search(rf"\b{number}\b", page.partition("## Limits")[2] or page.partition("## 限制")[2]), number
