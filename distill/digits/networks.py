"""The networks of the digits model, SD 1.5's in miniature, and its tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from accel.models.topology import narrowed

from ..sources.digits import SIZE, words

LATENT_SIZE = SIZE // 4

# SD 1.5's graph, block for block. Four heads and not eight, because eight heads of the 16 channels of the first stage
# would be two wide, less than any fused attention kernel takes.
UNET: Mapping[str, Any] = MappingProxyType(
    narrowed(
        "sd15",
        channels=(16, 32, 64, 64),
        sample_size=LATENT_SIZE,
        cross_attention_dim=64,
        norm_num_groups=8,
        attention_head_dim=4,
    )
)
# One stage less than SD 1.5's VAE, so 4 pixels to a latent cell and not 8: the digits are small images.
VAE: Mapping[str, Any] = MappingProxyType(
    dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
)
TEXT: Mapping[str, Any] = MappingProxyType(
    dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
)
# SD 1.5's own scheduler file, but for v instead of epsilon (see `train.denoising_loss`). PNDM does not read
# clip_sample; schedulers made from this config, such as DDIM, do.
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        clip_sample=False,
        timestep_spacing="leading",
    )
)

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(corpus: Iterable[str]) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016) carried on until every word of the corpus is one token.

    The most frequent neighbouring pair is merged first; ties go to the alphabet, so that the result is always the same.
    """
    counts = Counter(corpus)
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        # A part made by this very merge is longer than pair[0], so it cannot be merged a second time here.
        if result and (result[-1], part) == pair:
            result[-1] = "".join(pair)
        else:
            result.append(part)
    return result


def write_tokenizer(folder: Path) -> Any:
    """Write a complete `CLIPTokenizer` to a folder and load it.

    The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word, merges, start, end. So any text at all
    has tokens, and the words of the prompts have one each.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = learn_merges(words())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=77,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    # Which of the files the library writes differs between its versions; the three above are there in any case.
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Token ids [len(texts), 77], padded as the pipeline pads them."""
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
