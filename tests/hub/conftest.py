"""A hub with small stand-ins for everything that is published."""

import io
import json
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub.server import Hub

LM = random.Random(1).randbytes(3_000_000)


def parquet_bytes(rows: int, groups: int, size: int = 4000) -> bytes:
    rng = random.Random(2)
    table = pa.table(
        {
            "conversations": [json.dumps([{"role": "user", "content": f"{i}"}]) for i in range(rows)],
            "image_bytes": pa.array([rng.randbytes(size) for _ in range(rows)], pa.binary()),
        }
    )
    target = io.BytesIO()
    pq.write_table(table, target, row_group_size=rows // groups, data_page_size=1 << 16, write_batch_size=16)
    return target.getvalue()


def older_layout(rows: int) -> dict[str, bytes]:
    rng = random.Random(3)
    lines = [json.dumps({"conversations": [], "image": f"{i}.jpg, {i}b.jpg"}) for i in range(rows)]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for i in range(rows):
            for name in (f"{i}.jpg", f"{i}b.jpg"):
                archive.writestr(f"pictures/{name}", rng.randbytes(3000))
    return {"pretrain_data.jsonl": ("\n".join(lines) + "\n").encode(), "pretrain_images.zip": target.getvalue()}


def repos() -> dict[str, dict[str, bytes]]:
    weights = {"llm_512.pth": LM, "pretrain_vlm_512.pth": b"pretrain" * 999, "sft_vlm_512.pth": b"sft" * 999}
    tokenizer = {"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}"}
    clip = {"config.json": b'{"a": 1}', "preprocessor_config.json": b"{}", "pytorch_model.bin": b"clip" * 5000}
    weights_3v = {"llm_768.pth": b"base" * 999, "llm_768_moe.pth": b"experts" * 999, "sft_vlm_768.pth": b"sft" * 555}
    siglip = {"config.json": b'{"b": 1}', "preprocessor_config.json": b"{}", "model.safetensors": b"siglip" * 5000}
    data = {"pretrain_i2t.parquet": parquet_bytes(600, 6), "sft_i2t.parquet": parquet_bytes(600, 1, 12_000)}
    files = {}
    for owner, tower_owner in (("jingyaogong", "openai"), ("gongjy", "openai-mirror")):
        files |= {
            f"models/{tower_owner}/clip-vit-base-patch16": clip,
            f"models/{owner}/MiniMind2-Small-V": tokenizer,
            f"models/{owner}/MiniMind2-V-PyTorch": weights,
            f"models/{owner}/siglip2-base-p32-256-ve": siglip,
            f"models/{owner}/minimind-3v": {**tokenizer, "modeling_vlm.py": b"raise SystemExit"},
            f"models/{owner}/minimind-3v-pytorch": weights_3v,
            f"datasets/{owner}/minimind-v_dataset": data,
        }
    return files


@pytest.fixture
def hub():
    with Hub(repos()) as hub:
        yield hub


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits of a test are short: a stall is told after a second, and nothing is read from this machine's account."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr("minimind_v.core.hub.remote.FIRST_PAUSE", 0.01)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
