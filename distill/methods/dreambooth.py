"""DreamBooth: a subject from a few images, with prior preservation (Ruiz et al. 2022, arXiv 2208.12242).

    L = |eps - S(x_t, "a photo of sks dog")|^2 + w |eps' - S(x'_t, "a photo of a dog")|^2

x are images of the subject, x' images of its class that the model generated before training. Each batch has as many of
one as of the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from accel.errors import Notice, UserError

from ..data.batches import Batches, stream_of
from ..data.draws import Turn
from ..data.encoders import Encoders
from ..settings import DreamBoothRecipe
from ..sources.item import IMAGE_SUFFIXES, Item, size_of, upright_rgb
from ..training.drawn_images import draw_missing
from .kd import Denoising
from .lora import LowRank
from .lora import check as check_lora

# Class examples are counted from here on, so that they never share their noise with an example of the subject.
PRIOR = 1 << 40
_LORA_RATE, _FULL_RATE = 1e-4, 1e-6
_MANY = 3  # tokens that make a word no longer a rare token


def method(recipe: DreamBoothRecipe, encoders: Encoders) -> Denoising:
    """A LoRA, or at rank 0 all weights."""
    return LowRank(recipe, encoders) if recipe.rank else Denoising(recipe, encoders)


def completed(recipe: DreamBoothRecipe, encoders: Encoders) -> DreamBoothRecipe:
    """The recipe with the learning rate and the sample prompts filled in, which depend on other fields.

    Raises:
        UserError: for prompts that cannot work (`check_prompts`), or numbers out of range.
    """
    if recipe.rank:
        check_lora(recipe)
    if recipe.prior_weight and not recipe.class_data and recipe.class_images < 1:
        raise UserError(
            f"{recipe.class_images} class images preserve nothing", "--class-images 200, or --prior-weight 0"
        )
    check_prompts(recipe, [tokenizer for tokenizer, _ in encoders.text])
    rate = recipe.learning_rate or (_LORA_RATE if recipe.rank else _FULL_RATE)
    prompts = recipe.sample_prompts or "|".join(filter(None, (recipe.instance_prompt, recipe.class_prompt)))
    return dataclasses.replace(recipe, learning_rate=rate, sample_prompts=prompts)


# -------------------------------------------------------------------------------------------------------------- prompts


def check_prompts(recipe: DreamBoothRecipe, tokenizers: list[Any]) -> None:
    """Prompts that would train something else than was meant.

    Raises:
        UserError: for an empty prompt, one that is longer than the text encoder reads (the words that fall off are
            named), or an instance prompt equal to the class prompt.

    Warns:
        Notice: when a word of the instance prompt, that the class prompt has not, becomes many tokens.
    """
    example = '--instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog"'
    prompts = {"instance": recipe.instance_prompt}
    if recipe.prior_weight:
        prompts["class"] = recipe.class_prompt
    for name, prompt in prompts.items():
        if not prompt.strip():
            more = ", or --prior-weight 0 to train without a class" if name == "class" else ""
            raise UserError(f"the {name} prompt is empty", f"{example}{more}")
        for tokenizer in tokenizers:
            if lost := words_beyond(tokenizer, prompt):
                raise UserError(
                    f"the {name} prompt is longer than the {tokenizer.model_max_length} tokens that the text encoder "
                    f"reads; these words fall off: {' '.join(lost)}",
                    f"shorten --{name}-prompt",
                )
    words, known = recipe.instance_prompt.lower().split(), recipe.class_prompt.lower().split()
    if words == known:
        raise UserError(
            f"instance prompt and class prompt are the same: {recipe.instance_prompt!r}",
            f"put a rare word into the instance prompt: {example}",
        )
    for word in dict.fromkeys(word for word in words if word not in known):
        pieces = tokenizers[0].tokenize(word)
        if len(pieces) >= _MANY:
            shown = ", ".join(piece.replace("</w>", "") for piece in pieces)
            warnings.warn(
                Notice(
                    f"the word {word!r} becomes {len(pieces)} tokens ({shown}); a rare word of one token, such as "
                    "sks, is learnt faster and mixes up less"
                ),
                stacklevel=2,
            )


def words_beyond(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that do not fit into the tokenizer's length whole."""
    words = prompt.split()
    for count in range(len(words), 0, -1):
        if len(tokenizer(" ".join(words[:count])).input_ids) <= tokenizer.model_max_length:
            return words[count:]
    return words


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class SubjectImages:
    """The images of a folder and its subfolders, all with one caption (an `ImageSource`)."""

    folder: Path
    names: tuple[str, ...]
    caption: str

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Item:
        return Item(upright_rgb(self.folder / self.names[row], self.names[row]), self.captions(row), self.names[row])

    def captions(self, row: int) -> tuple[str, ...]:
        return (" ".join(self.caption.split()),)

    @cached_property
    def identity(self) -> str:
        """sha256 over names, sizes in bytes and the caption."""
        rows = [(name, size_of(self.folder / name)) for name in self.names]
        return hashlib.sha256(repr((rows, self.captions(0))).encode()).hexdigest()


def open_images(folder: str | Path, caption: str, flag: str = "--data") -> SubjectImages:
    """The images of a folder, all with one caption.

    Raises:
        UserError: when there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", f"{flag} FOLDER, with the images in it")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not names:
        kinds = ", ".join(IMAGE_SUFFIXES[:4])
        raise UserError(f"{folder} has no images", f"{flag} FOLDER, with files such as {kinds}")
    return SubjectImages(folder, tuple(names), caption)


def batches_of(
    recipe: DreamBoothRecipe,
    encoders: Encoders,
    run: Path,
    accelerator: Any,
    say: Callable[[str], None],
    turns: Sequence[Turn] = (),
) -> Batches:
    """Micro-batches of `batch` images of the subject, then as many of the class, marked by `prior`."""
    images = open_images(recipe.data, recipe.instance_prompt)
    if recipe.prior_weight:
        folder = class_images(recipe, encoders, run, accelerator, say)
        of_class = open_images(folder, recipe.class_prompt, "--class-data")
    subject = stream_of(images, recipe, encoders, run, accelerator, say, turns)
    if not recipe.prior_weight:
        return subject
    prior = stream_of(of_class, recipe, encoders, run, accelerator, say, turns, suffix="-class")

    def batches(step: int) -> Iterator[dict[str, Any]]:
        with contextlib.closing(subject(step)) as ours, contextlib.closing(prior(step + PRIOR)) as others:
            for one, other in zip(ours, others, strict=False):
                yield joined(one, other)

    return batches


def joined(subject: Mapping[str, Any], prior: Mapping[str, Any]) -> dict[str, Any]:
    """Two batches as one; `prior`, bool [n], marks the rows of the second."""
    batch = {
        key: torch.cat([value, prior[key]]) if isinstance(value, torch.Tensor) else [*value, *prior[key]]
        for key, value in subject.items()
    }
    counts = torch.tensor([len(subject["index"]), len(prior["index"])])
    return batch | {"prior": torch.repeat_interleave(torch.tensor([False, True]), counts)}


# ------------------------------------------------------------------------------------------------------- class images


def class_images(
    recipe: DreamBoothRecipe, encoders: Encoders, run: Path, accelerator: Any, say: Callable[[str], None]
) -> Path:
    """The folder of class images: the one given, or `<run>/class`, in which the model generates those that are missing.

    Raises:
        UserError: when the folder holds images that were generated with other settings.
    """
    if recipe.class_data:
        return Path(recipe.class_data).expanduser()
    folder = run / "class"
    draw_missing(
        folder,
        [recipe.class_prompt] * recipe.class_images,
        encoders,
        recipe,
        accelerator,
        say,
        title="class images",
        said={"prompt": recipe.class_prompt},
        steps=recipe.sample_steps,
        guidance=recipe.sample_guidance,
        batch=recipe.class_batch,
        record="class.json",
        keep=f", or keep them with --class-data {folder}",
    )
    return folder
