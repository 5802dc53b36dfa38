"""Quality of generated emoji: prompt accuracy by retrieval among captions, and Frechet distance to real drawings.

The judge is a small image-text model in the manner of CLIP (Radford et al. 2021, arXiv 2103.00020), trained on other
draws of the images than the model that it judges. Prompt accuracy: the share of images whose own prompt is nearest to
them among all prompts of the set, 500 as it is published; guessing gets 0.2 %. Background accuracy needs no network:
the share of images whose four corners are nearest to the colour that was asked for. The Frechet distance (Heusel et al.
2017, arXiv 1706.08500) is taken in the judge's image features, from draws that neither model was trained on. Each
figure is given with what real drawings of the same prompts get.

A judge is a folder: network, tokenizer, prompts, and statistics of the real drawings. So an evaluation needs no font.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import nn

from accel.assets import EMOJI
from accel.errors import UserError
from accel.files import read_json, write_json

from ..sources.emoji import BACKGROUNDS, COLOURS, EmojiSource, is_held_out
from .metrics import Statistics, frechet_of, statistics

FACTS, WEIGHTS = "judge.json", "judge.safetensors"
WIDTHS = (32, 64, 128, 192)
EMBEDDING = 128
LENGTH = 32  # tokens that the judge reads; the longest caption has fewer
JUDGE_TEXT: Mapping[str, Any] = MappingProxyType(
    dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=EMBEDDING,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
    )
)
_TOKEN_IDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_LOW, _HIGH = slice(0, 4), slice(-4, None)


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, each after group norm and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class ImageText(nn.Module):
    """Images and captions in one space, nearest where they belong together.

    `text` is a CLIP text encoder. Its states from the end of the text on are averaged, so that each of them, of which
    a UNet sees all, learns to carry the caption.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
            layers += [Residual(outputs)] if outputs > WIDTHS[1] else [nn.GroupNorm(8, outputs), nn.SiLU()]
        size = 64 // 2 ** len(WIDTHS)
        self.image = nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(WIDTHS[-1] * size**2, EMBEDDING))
        self.project = nn.Linear(text.config.hidden_size, EMBEDDING)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Features [n, 128] of images [n, 3, 64, 64] in -1..1."""
        return self.image(images)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [n, 128] of captions by their token ids [n, length]."""
        states = self.text(tokens).last_hidden_state
        # The id that ends a text is also that of the padding: all positions from the first one on.
        after = (tokens == self.text.config.eos_token_id).to(states.dtype)[..., None]
        return self.project((states * after).sum(1) / after.sum(1))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [n, m] of n images and m captions."""
        seen, read = F.normalize(self.see(images).float(), dim=-1), F.normalize(self.read(tokens).float(), dim=-1)
        return self.scale.exp().clamp(max=100) * seen @ read.T


def contrastive_loss(model: ImageText, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of finding the caption of each image and the image of each caption in the batch (Radford 2021)."""
    scores = model(images, tokens)
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


# -------------------------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True, eq=False)
class Judge:
    """What measures emoji.

    Attributes:
        model: the network.
        tokenizer: its own.
        prompts: of the set: `prompt`, `background` and `held_out`, whether training never had that pair.
        reference: mean [128] and covariance [128, 128] of the features of real drawings.
        real: what real drawings of the prompts get: the ceiling of each accuracy, the floor of the distance.
    """

    model: ImageText
    tokenizer: Any
    prompts: list[dict[str, Any]]
    reference: Statistics
    real: dict[str, float]

    def texts(self) -> list[str]:
        return [entry["prompt"] for entry in self.prompts]


def judge_folder(reference: str | Path | None = None) -> Path:
    """The folder of the judge that was named, or of the one that ships.

    Raises:
        UserError: when there is no judge in it.
    """
    folder = EMOJI / "judge" if reference is None else Path(reference)
    if not (folder / FACTS).is_file():
        raise UserError(
            f"{folder} holds no judge of emoji" if reference else "no judge of emoji ships with this version",
            "name the one beside the model: --reference out/emoji/judge; "
            "python -m accel.distill.emoji.train --out out/emoji makes both",
        )
    return folder


@cache
def open_judge(folder: Path) -> Judge:
    """The judge of a folder that `save_judge` wrote."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    facts = read_json(folder / FACTS, "the judge of emoji")
    tensors = load_file(folder / WEIGHTS)
    reference = tensors.pop("reference.mean").numpy(), tensors.pop("reference.covariance").numpy()
    model = ImageText(CLIPTextModel(CLIPTextConfig(**facts["text"])))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return Judge(model.eval().requires_grad_(False), tokenizer, facts["prompts"], reference, facts["real"])


def save_judge(judge: Judge, folder: Path, tokenizer: Path) -> None:
    """Write a judge, weights in half precision, with the tokenizer's files as they are in `tokenizer`."""
    mean, covariance = map(torch.from_numpy, judge.reference)
    tensors = {name: tensor.half().contiguous() for name, tensor in judge.model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(serialized(tensors | {"reference.mean": mean, "reference.covariance": covariance}))
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    text = {key: judge.model.text.config.to_dict()[key] for key in (*JUDGE_TEXT, *_TOKEN_IDS)}
    write_json(folder / FACTS, dict(prompts=judge.prompts, real=judge.real, text=text))


def made_judge(
    model: ImageText, tokenizer: Any, prompts: EmojiSource, held_out: EmojiSource, train: EmojiSource
) -> Judge:
    """A judge of a trained network, rounded to half precision, with the figures that real drawings get."""
    model = model.half().float().eval().requires_grad_(False)
    reference = statistics(features_of(model, every_image(held_out)))
    judge = Judge(model, tokenizer, prompt_set(prompts), reference, {})
    real = evaluate(every_image(prompts), range(len(prompts)), judge)
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(prompts)]
    real["frechet_distance"] = frechet_of(statistics(features_of(model, train.images(rows))), reference)
    return replace(judge, real=real)


def prompt_set(source: EmojiSource) -> list[dict[str, Any]]:
    """A prompt for every row of the part "prompts": one of its captions, templates in turn."""
    found = []
    for row in range(len(source)):
        glyph, colour = source.glyphs[int(source.rows.glyph[row])], COLOURS[int(source.rows.colour[row])]
        texts = source.captions(row)
        found.append(dict(prompt=texts[row % len(texts)], background=colour, held_out=is_held_out(glyph, colour)))
    return found


def every_image(source: EmojiSource) -> torch.Tensor:
    """All images [n, 3, 64, 64] of a source."""
    return torch.cat([source.images(rows) for rows in torch.arange(len(source)).split(256)])


# ------------------------------------------------------------------------------------------------------------ figures


@torch.no_grad()
def features_of(model: ImageText, images: torch.Tensor) -> np.ndarray:
    """Image features [n, 128], in double precision."""
    return torch.cat([model.see(part) for part in images.split(250)]).double().numpy()


@torch.no_grad()
def found_prompts(judge: Judge, images: torch.Tensor) -> np.ndarray:
    """The number [n] of the prompt that is nearest to each image."""
    ids = judge.tokenizer(
        judge.texts(), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    read = F.normalize(torch.cat([judge.model.read(part) for part in ids.split(250)]).double(), dim=-1)
    seen = F.normalize(torch.from_numpy(features_of(judge.model, images)), dim=-1)
    return (seen @ read.T).argmax(1).numpy()


def backgrounds(images: torch.Tensor) -> list[str]:
    """The colour of `BACKGROUNDS` that the median of the four corners, 4x4 pixels each, is nearest to."""
    corners = torch.cat(
        [images[:, :, rows, columns].flatten(2) for rows in (_LOW, _HIGH) for columns in (_LOW, _HIGH)], -1
    )
    seen = (corners.median(-1).values + 1) * 127.5
    palette = torch.tensor(list(BACKGROUNDS.values())).float()
    return [COLOURS[number] for number in torch.cdist(seen, palette).argmin(1).tolist()]


def evaluate(images: torch.Tensor, wanted: Sequence[int], judge: Judge) -> dict[str, float]:
    """Figures of images [n, 3, 64, 64] in -1..1 that were drawn for the prompts number `wanted` [n].

    Returns:
        `prompt_accuracy`, `prompt_accuracy_held_out` (of pairs that training never had; absent where none was asked
        for), `background_accuracy` and `frechet_distance`.
    """
    right = found_prompts(judge, images) == np.asarray(wanted)
    asked = [judge.prompts[number] for number in wanted]
    unseen = [hit for hit, entry in zip(right, asked, strict=True) if entry["held_out"]]
    colours = [seen == entry["background"] for seen, entry in zip(backgrounds(images), asked, strict=True)]
    held_out = {"prompt_accuracy_held_out": float(np.mean(unseen))} if unseen else {}
    distance = frechet_of(statistics(features_of(judge.model, images)), judge.reference)
    return dict(
        images=len(images),
        prompt_accuracy=float(right.mean()),
        **held_out,
        background_accuracy=float(np.mean(colours)),
        frechet_distance=distance,
    )
