"""Prompt files: encodings, comments, extended versions, and what is wrong with a file."""

from __future__ import annotations

import pytest
import torch

from sftk.data.digits import embed_prompts
from sftk.data.prompts import Prompts, read_prompts
from sftk.errors import DataError


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines(tmp_path, mark, end):
    text = end.join(["# digits", "", "a fox \U0001f3a5", "   ", "  海边的日落  ", "#no", "a # is kept"])
    (tmp_path / "p.txt").write_bytes(mark + text.encode())
    assert read_prompts(tmp_path / "p.txt") == ("a fox \U0001f3a5", "海边的日落", "a # is kept")


@pytest.mark.parametrize("data", [b"", b"\n \n", b"# only comments\n", b"\xef\xbb\xbf"])
def test_no_prompt(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"p.txt holds no prompt; expected one a line"):
        read_prompts(tmp_path / "p.txt")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("a\nb\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt:3 is not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"cannot read the prompt file .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")


def test_extended_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a 3 moving left\n\nan 8 moving up\n")
    (tmp_path / "long.txt").write_text("the digit three moving to the left\nthe number eight moving upwards\n")
    data = Prompts(str(tmp_path / "p.txt"), text="digits", extended=str(tmp_path / "long.txt"))
    assert (len(data), data[1]["prompt"]) == (2, "the number eight moving upwards")
    assert torch.equal(data[1]["prompt_embeds"], embed_prompts(["an 8 moving up"])[0])
    assert data[0]["negative_embeds"].abs().max() == 0
    (tmp_path / "short.txt").write_text("a 3 moving left\n")
    with pytest.raises(DataError, match=r"short.txt has 1 prompts, .*p.txt has 2; the extended prompts go line by line"):
        Prompts(str(tmp_path / "p.txt"), text="digits", extended=str(tmp_path / "short.txt"))


def test_negative_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("a 3 moving left\n")
    data = Prompts(str(tmp_path / "p.txt"), text="digits", negative="a 5 moving up")
    assert torch.equal(data[0]["negative_embeds"], embed_prompts(["a 5 moving up"])[0])
