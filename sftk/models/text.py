"""Wan's text encoder, UMT5, through transformers: prompts to embeddings."""

from __future__ import annotations

import functools
import html
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sftk.core.extras import import_extra
from sftk.errors import CheckpointError
from sftk.models.config_files import CLASSES as BACKBONES
from sftk.models.mapped import assign_weights, map_file, map_folder
from sftk.models.text_keys import encoder_config, to_transformers
from sftk.models.weight_folders import holds_config, read_json, shown_contents

WAN_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
WAN_TOKENIZER = "google/umt5-xxl"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def clean_prompt(text: str) -> str:
    """A prompt as Wan cleans it: mended encoding (where ftfy is installed), HTML entities, white space.

    Example:
        >>> clean_prompt("  a fox &amp;amp;\\n  a hare ")
        'a fox & a hare'
    """
    # Twice, since captions from the web are often escaped twice.
    return " ".join(html.unescape(html.unescape(_mend()(text))).split())


@functools.cache
def _mend() -> Callable[[str], str]:
    """What mends wrongly decoded text: ftfy where it is installed, else nothing."""
    return str if importlib.util.find_spec("ftfy") is None else importlib.import_module("ftfy").fix_text


@attrs.frozen(eq=False)
class TextEncoder:
    """An encoder and its tokenizer.

    Args:
        module: transformers' `UMT5EncoderModel`, frozen.
        tokenizer: from transformers.
        tokens: rows of an embedding; longer prompts are cut.
        device: to compute on.
        dtype: to compute in.
        offload: keep the weights on the host, and copy them to the device for each call only.
    """

    module: Any
    tokenizer: Any
    tokens: int
    device: torch.device
    dtype: torch.dtype
    offload: bool = False

    @property
    def width(self) -> int:
        """Of an embedding's rows."""
        return self.module.config.d_model

    @torch.no_grad()
    def rows(self, prompts: Sequence[str]) -> list[Tensor]:
        """The embedding of each prompt at its true length, [n, width] in the encoder's dtype on the CPU.

        Every prompt is encoded alone and without padding. So its embedding does not depend on the others, and nothing is
        computed for padding, which the attention mask would hide.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        if not self.offload:
            return [self._encode(one) for one in ids]
        host = {name: parameter.data for name, parameter in self.module.named_parameters()}
        try:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(self.device, self.dtype)
            return [self._encode(one) for one in ids]
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.data = host[name]

    def ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt, the end token among them, at most `tokens`."""
        return self.tokenizer(clean_prompt(prompt), truncation=True, max_length=self.tokens).input_ids

    def _encode(self, ids: Sequence[int]) -> Tensor:
        found = self.module(input_ids=torch.tensor([list(ids)], device=self.device))
        return found.last_hidden_state[0].to("cpu", self.dtype)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, tokens, width] float32 on the CPU; rows after a prompt's true length are zero."""
        return torch.stack([pad_rows(rows, self.tokens) for rows in self.rows(prompts)])


def pad_rows(rows: Tensor, tokens: int) -> Tensor:
    """[tokens, D] float32 from [n, D]: zeros after the true length, as the backbone was trained.

    Example:
        >>> pad_rows(torch.ones(1, 2, dtype=torch.bfloat16), 3)
        tensor([[1., 1.],
                [0., 0.],
                [0., 0.]])
    """
    return nn.functional.pad(rows.float(), (0, 0, 0, tokens - len(rows)))


def load_text_encoder(
    path: Path,
    *,
    tokenizer: Path | None = None,
    tokens: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    offload: bool = False,
) -> TextEncoder:
    """Wan's text encoder from any of the places where it is published.

    Weights are mapped from the disk: without `offload`, only tensors that change device or dtype are copied.

    Args:
        path: a Hugging Face folder (of the encoder, or of a pipeline with `text_encoder/` and `tokenizer/`), Wan's `.pth` file,
            or a folder with that file and `google/umt5-xxl/`.
        tokenizer: its folder, where it does not lie there.
        tokens: rows of an embedding. Wan takes 512.

    Raises:
        CheckpointError: the encoder or the tokenizer is missing, broken or another one.
        SftkError: transformers is not installed.
    """
    path, device = Path(path), torch.device(device)
    library = import_extra("transformers", "the text encoder")
    place = _find_encoder(path)
    words = _load_tokenizer(library, _find_tokenizer(path, place, tokenizer))
    if place.is_file():
        weights = map_file(place)
        config = library.UMT5Config(**encoder_config(weights, place))
        weights = to_transformers(weights)
    else:
        config = _read_config(library, place)
        weights = map_folder(place, "model")
        # A checkpoint of the whole model has a decoder, which prompts do not need.
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder.", "lm_head."))}
    if len(words) > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {len(words)} tokens, the encoder in {place} embeds {config.vocab_size}")
    # Files hold the tied embedding under either name, or both.
    names = ("shared.weight", "encoder.embed_tokens.weight")
    weights |= {name: weights[other] for name, other in (names, names[::-1]) if other in weights and name not in weights}
    with torch.device("meta"):
        module = library.UMT5EncoderModel(config)
    assign_weights(module, weights, place)
    module.encoder.embed_tokens.weight = module.shared.weight  # else either would be moved to the device on its own
    module = module.requires_grad_(False).eval()
    if not offload:
        module = module.to(device, dtype)
    return TextEncoder(module, words, tokens, device, dtype, offload)


def _find_encoder(path: Path) -> Path:
    if path.is_file():
        return path
    for place in (path / "text_encoder", path / WAN_FILE, path):
        if place.is_file() or holds_config(place, BACKBONES):
            return place
    found = f"holds only {shown_contents(path)}" if path.is_dir() else "is no folder"
    raise CheckpointError(f"no text encoder at {path}, which {found}; expected text_encoder/config.json, or {WAN_FILE}")


def _find_tokenizer(path: Path, place: Path, given: Path | None) -> Path:
    places = (
        [given] if given is not None else [path / "tokenizer", place.parent / "tokenizer", place.parent / WAN_TOKENIZER, place]
    )
    for folder in places:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    looked = ", ".join(dict.fromkeys(str(folder) for folder in places if not folder.is_file()))
    raise CheckpointError(
        f"missing tokenizer: none of {looked} holds {' or '.join(TOKENIZER_FILES)}; "
        f"download the folder tokenizer/ (or {WAN_TOKENIZER}/), or name it with `tokenizer`"
    )


def _load_tokenizer(library: Any, folder: Path) -> Any:
    try:
        return library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}; download it again") from error


def _read_config(library: Any, folder: Path) -> Any:
    values = read_json(folder / "config.json")
    if values.get("model_type") != "umt5":
        found = values.get("model_type") or values.get("_class_name")
        raise CheckpointError(f"{folder / 'config.json'} is of a {found!r} model; expected 'umt5'")
    return library.UMT5Config.from_dict(values)
