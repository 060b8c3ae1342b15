"""Stores of prompt embeddings: what is written, killed processes, and training that holds no encoder."""

from __future__ import annotations

import os
import signal
import time

import lmdb
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch.utils.data import DataLoader

from sftk.cli import main
from sftk.data import embedders, wan
from sftk.data.embed import embed_prompts, prompts_of
from sftk.data.embedders import make_embedder
from sftk.data.embeddings import EmbeddingStore
from sftk.data.lmdb_store import write_store
from sftk.data.sources import source
from sftk.errors import DataError

PROMPTS = ("a red fox", "the hare runs slowly over the snow " * 2, "the snow")
SIZES = {"text_len": 24, "text_dim": 16}


@pytest.fixture
def umt5(text_folders):
    return {"use": "umt5", "with": {"path": str(text_folders / "wan"), "device": "cpu", **SIZES}}


def stored(path):
    return {"use": "stored", "with": {"path": str(path), **SIZES}}


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_stored_embedding_is_the_encoders(umt5, tmp_path, kind):
    found = embed_prompts(PROMPTS, tmp_path / "store", umt5, format=kind)
    assert (found.written, found.there) == (3, 0)
    wanted = make_embedder(umt5)(PROMPTS)
    given = make_embedder(stored(tmp_path / "store"))(PROMPTS)
    assert given.dtype == torch.float32
    if kind == "bf16":
        assert torch.equal(given, wanted)  # the encoder computes in bf16: nothing is rounded
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4)
    assert make_embedder(umt5).shape == make_embedder(stored("")).shape == (24, 16)


def test_only_the_true_rows_are_stored(umt5, tmp_path):
    embed_prompts(PROMPTS, tmp_path / "store", umt5)
    lengths = [len(rows) for rows in make_embedder(umt5).rows(PROMPTS)]
    assert lengths[0] == 4  # three words and the end token
    with lmdb.open(str(tmp_path / "store"), readonly=True) as environment, environment.begin() as transaction:
        sizes = [len(value) for key, value in transaction.cursor() if key.startswith(b"embedding_")]
    assert sorted(sizes) == sorted(2 * 16 * length for length in lengths)


def test_a_prompt_without_rows_is_zero(tmp_path):
    """The embedded task's unconditional embedding is zero: no row of it is stored."""
    embed_prompts([""], tmp_path / "store", "digits")
    assert EmbeddingStore.open(tmp_path / "store").prompts() == {"": 0}
    assert torch.equal(EmbeddingStore.open(tmp_path / "store")[""], torch.zeros(4, 32))


def test_prompts_are_added_and_never_embedded_twice(umt5, tmp_path):
    assert embed_prompts(PROMPTS[:1], tmp_path / "store", umt5).written == 1
    twice = (*PROMPTS, "  a  red\tfox ", PROMPTS[2])  # white space is cleaned before
    found = embed_prompts(twice, tmp_path / "store", umt5)
    assert (found.written, found.there) == (2, 3)
    store = EmbeddingStore.open(tmp_path / "store")
    assert all(prompt in store for prompt in twice)
    assert "a fox" not in store
    with pytest.raises(DataError, match=r"has no embedding of 'a fox'; add it with `sftk data embed PROMPTS"):
        store["a fox"]


def test_another_encoder_or_format_is_refused(umt5, text_folders, tmp_path):
    embed_prompts(PROMPTS, tmp_path / "store", umt5)
    # Where it computes is no other setting.
    embed_prompts(PROMPTS, tmp_path / "store", {"use": "umt5", "with": umt5["with"] | {"offload": True}})
    with pytest.raises(DataError, match=r"made with other settings: format was 'bf16', is now 'fp16'"):
        embed_prompts(PROMPTS, tmp_path / "store", umt5, format="fp16")
    with pytest.raises(DataError, match=r"made with other settings: with was .*wan.*is now .*hf"):
        embed_prompts(PROMPTS, tmp_path / "store", {"use": "umt5", "with": umt5["with"] | {"path": str(text_folders / "hf")}})
    write_store(tmp_path / "latents", [(torch.zeros(1, 4, 8, 8), "a fox")])
    with pytest.raises(DataError, match=r"made with other settings"):
        embed_prompts(PROMPTS, tmp_path / "latents", umt5)
    with pytest.raises(DataError, match=r"holds no prompt embeddings"):
        make_embedder(stored(tmp_path / "latents"))(["a fox"])
    with pytest.raises(DataError, match=r"holds embeddings of 24 x 16; set text_len: 24, text_dim: 16"):
        make_embedder({"use": "stored", "with": {"path": str(tmp_path / "store")}})(["a red fox"])


def test_an_embedding_that_fp16_cannot_hold_is_refused(monkeypatch, tmp_path):
    class Huge:
        shape = (2, 3)

        def rows(self, prompts):
            return [torch.full((1, 3), 1e5) for _ in prompts]

    monkeypatch.setitem(embedders.EMBEDDERS, "huge", Huge)
    with pytest.raises(DataError, match=r"not finite in fp16; use the format bf16"):
        embed_prompts(["a"], tmp_path / "store", "huge", format="fp16")
    assert embed_prompts(["a"], tmp_path / "other", "huge").written == 1


def test_a_killed_process_is_continued(monkeypatch, tmp_path):
    """A real process and a real SIGKILL: what it wrote stays, and the rest is made once."""

    class Slow:
        shape = (4, 3)
        made = 0

        def rows(self, prompts):
            Slow.made += len(prompts)
            time.sleep(0.01)
            return [torch.full((1 + len(prompt) % 4, 3), float(len(prompt))) for prompt in prompts]

    monkeypatch.setitem(embedders.EMBEDDERS, "slow", Slow)
    prompts = ["fox " * count for count in range(1, 61)]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        embed_prompts(prompts, tmp_path / "store", "slow", batch=2, report=lambda done, total: os.write(write, b".") and None)
        os._exit(0)
    for _ in range(8):
        assert os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(read)
    os.close(write)
    found = embed_prompts(prompts, tmp_path / "store", "slow", batch=2)
    assert 14 <= found.there < 60
    assert Slow.made == found.written == 60 - found.there
    embed_prompts(prompts, tmp_path / "whole", "slow")
    one, other = (EmbeddingStore.open(tmp_path / name) for name in ("store", "whole"))
    assert all(torch.equal(one[prompt], other[prompt]) for prompt in prompts)


def test_training_data_reads_the_store_and_loads_no_encoder(umt5, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    negative = "slowly"
    embed_prompts((*PROMPTS, negative), tmp_path / "store", umt5)
    wanted = make_embedder(umt5)((*PROMPTS, negative))
    monkeypatch.setattr(wan, "load_text_encoder", lambda *_, **__: pytest.fail("the encoder was loaded"))
    monkeypatch.setattr(wan, "_LOADED", {})
    options = {"path": str(tmp_path / "prompts.txt"), "text": stored(tmp_path / "store"), "negative": negative}
    data = source("prompts").build(frames=1, channels=4, height=8, width=8, seed=0, options=options)
    for batch in (data[1], list(DataLoader(data, batch_size=None, num_workers=1))[1]):
        assert torch.equal(batch["prompt_embeds"], wanted[1])
        assert torch.equal(batch["negative_embeds"], wanted[3])


def test_prompts_of_files_and_stores(tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na fox\na hare\n")
    assert prompts_of(tmp_path / "prompts.txt") == ("a fox", "a hare")
    write_store(tmp_path / "store", [(torch.zeros(1, 4, 8, 8), f"a fox {i}") for i in range(3)], shards=2)
    assert prompts_of(tmp_path / "store") == ("a fox 0", "a fox 2", "a fox 1")


def test_the_command(umt5, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    arguments = ["data", "embed", str(tmp_path / "prompts.txt"), str(tmp_path / "store"), "--text", yaml.safe_dump(umt5)]
    result = CliRunner().invoke(main, [*arguments, "--negative", "the snow"])
    assert result.exit_code == 0, result.output
    assert "4 prompts embedded, 0 were there already" in result.output
    store = EmbeddingStore.open(tmp_path / "store")
    assert all(prompt in store for prompt in ("", "the snow", *PROMPTS[:2]))
    shown = CliRunner().invoke(main, ["data", "inspect", str(tmp_path / "store")]).output
    rows = sum(len(one) for one in make_embedder(umt5).rows(["", "the snow", *PROMPTS[:2]]))
    assert f"4 prompt embeddings of up to 24 x 16, bf16, {rows / 4:.1f} rows on average" in shown
    assert "a red fox" in shown
    again = CliRunner().invoke(main, arguments)
    assert "0 prompts embedded, 3 were there already" in again.output
    nowhere = "{use: umt5, with: {path: nowhere, device: cpu}}"
    missing = CliRunner().invoke(main, [*arguments[:3], str(tmp_path / "new"), "--text", nowhere])
    assert missing.exit_code == 1
    assert "no text encoder at nowhere, which is no folder" in missing.output
