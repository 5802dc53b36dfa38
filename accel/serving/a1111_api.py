"""The API of AUTOMATIC1111's web UI, as clients use it: txt2img, img2img, progress, interrupt, options, lists."""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..sampling.samplers import SAMPLERS, SIGMAS
from .exchange import Exchange
from .job import Order
from .limits import Cancelled
from .models import Maker, Models
from .pictures import base64_of, encoded, from_base64

router = APIRouter(prefix="/sdapi/v1")
# A1111's names of samplers -> ours.
NAMES = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ 2S a": "dpmpp_2s_sde",
}
_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")
_AUTOMATIC = ("", "automatic", "use same scheduler", "uniform", "normal")
# What would change the image and is not done here -> the value that asks for nothing.
_NOT_DONE = {
    **dict.fromkeys(("enable_hr", "restore_faces", "tiling"), False),
    **dict.fromkeys(("subseed_strength", "script_name", "refiner_checkpoint", "inpainting_fill"), None),
    **dict.fromkeys(("alwayson_scripts", "styles"), None),
}


class Text(BaseModel):
    """The body of txt2img. Fields that change no image here are taken as A1111 takes those it does not know."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, lt=2**63)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] = Field(default_factory=dict)
    send_images: bool = True

    def check(self) -> None:
        """Refuse what would change the image, and is not done here."""
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_DONE and value not in (_NOT_DONE[name], None, 0, False, "", [], {}, -1):
                if name == "inpainting_fill" and value == 1:  # "original", which is what is done
                    continue
                raise UserError(f"{name} is not supported", "leave it out")

    def call(self) -> dict[str, Any]:
        """The arguments of a pipeline's call."""
        self.check()
        if self.batch_size < 1 or self.n_iter < 1:
            raise UserError(f"invalid batch_size x n_iter: {self.batch_size} x {self.n_iter}", "give 1 or more of each")
        name, sigmas = sampler_of(self.sampler_name or self.sampler_index, self.scheduler)
        return dict(
            prompt=_LORA.sub("", self.prompt).strip(),
            negative_prompt=self.negative_prompt or None,
            num_images_per_prompt=self.batch_size * self.n_iter,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance_scale=self.cfg_scale,
            sampler=name,
            sigmas=sigmas,
            seed=secrets.randbelow(2**31) if self.seed < 0 else self.seed,
        )

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Name and scale of each `<lora:name:0.8>` in the prompt, which is no text to A1111 either.

        Raises:
            UserError: for a scale that is no number.
        """
        found = []
        for name, scale in _LORA.findall(self.prompt):
            try:
                found.append((name, float(scale or 1)))
            except ValueError:
                found.append((name, math.nan))
            if not math.isfinite(found[-1][1]):
                raise UserError(f"invalid scale of the LoRA {name}: {scale}", f"<lora:{name}:0.8>")
        return found


class Picture(Text):
    """The body of img2img."""

    init_images: list[str] = Field(default_factory=list)
    denoising_strength: float = 0.75
    mask: str | None = None
    inpainting_mask_invert: int = 0

    def images(self) -> dict[str, Any]:
        """The arguments that are images."""
        if len(self.init_images) != 1:
            raise UserError(f"{len(self.init_images)} init_images", "send one, as base64")
        call: dict[str, Any] = {"strength": self.denoising_strength}
        call["image"] = from_base64(self.init_images[0], "init_images[0]").convert("RGB")
        if self.mask:
            from PIL import ImageOps

            mask = from_base64(self.mask, "mask").convert("L")
            call["mask_image"] = ImageOps.invert(mask) if self.inpainting_mask_invert else mask
        return call


def sampler_of(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """Our sampler and spacing of A1111's names, such as "DPM++ 2M Karras"; None for the bundle's own.

    Raises:
        UserError: for a name that stands for none.
    """
    sigmas = (scheduler or "").lower()
    if name and name not in NAMES and name.rpartition(" ")[2].lower() in SIGMAS:
        name, _, sigmas = name.rpartition(" ")
    sigmas = sigmas.lower()
    if sigmas not in (*_AUTOMATIC, *SIGMAS):
        raise UserError(f"unknown scheduler {scheduler!r}", f"one of: Automatic, {', '.join(SIGMAS)}")
    if name and name not in NAMES and name not in SAMPLERS and name.lower() != "automatic":
        raise UserError(f"unknown sampler {name!r}", f"one of: {', '.join([*NAMES, *SAMPLERS])}")
    ours = None if not name or name.lower() == "automatic" else NAMES.get(name, name)
    return ours, None if sigmas in _AUTOMATIC else sigmas


@router.post("/txt2img")
async def txt2img(body: Text, request: Request) -> Any:
    """Images of a prompt."""
    return await _answered(body, body.call(), request)


@router.post("/img2img")
async def img2img(body: Picture, request: Request) -> Any:
    """Images from an image, and with a mask only where that is white."""
    return await _answered(body, body.call() | await asyncio.to_thread(body.images), request)


async def _answered(body: Text, call: dict[str, Any], request: Request) -> Any:
    state = request.app.state
    worker: Maker = state.models.named(body.override_settings.get("sd_model_checkpoint") or state.checkpoint)
    exchange = await Exchange.open(worker, call, loras=body.loras)
    try:
        done = await exchange.images(request)
        interrupted = False
    except Cancelled as error:  # A1111 gives what was made until the interruption
        done, interrupted = error.images, True
    plan = exchange.order.requests[0].plan
    height, width = exchange.order.requests[0].pixels
    info = dict(prompt=body.prompt, negative_prompt=body.negative_prompt, width=width, height=height)
    info |= dict(seed=call["seed"], all_seeds=[event.seed for event in done], all_prompts=[body.prompt] * len(done))
    info |= dict(steps=plan.steps, cfg_scale=plan.guidance, sampler_name=plan.sampler, batch_size=len(done))
    info |= dict(sd_model_name=worker.name, interrupted=interrupted)
    lines = [_infotext(body, event.seed, info) for event in done]
    files = [await asyncio.to_thread(encoded, e.image, text=t) for e, t in zip(done, lines, strict=True)]
    images = [base64_of(file) for file in files] if body.send_images else []
    echoed = body.model_dump(exclude={"init_images", "mask"})
    return {"images": images, "parameters": echoed, "info": json.dumps({**info, "infotexts": lines})}


def _infotext(body: Text, seed: int, info: dict[str, Any]) -> str:
    parts = [f"Steps: {info['steps']}", f"Sampler: {info['sampler_name']}", f"CFG scale: {info['cfg_scale']:g}"]
    parts += [f"Seed: {seed}", f"Size: {info['width']}x{info['height']}", f"Model: {info['sd_model_name']}"]
    negative = f"\nNegative prompt: {body.negative_prompt}" if body.negative_prompt else ""
    return f"{body.prompt}{negative}\n{', '.join(parts)}"


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> Any:
    """Of the oldest order in the making."""
    found: list[tuple[Maker, Order]] = [(w, order) for w in request.app.state.models.values() for order in w.orders]
    if not found:
        state = dict(skipped=False, interrupted=False, job="", job_count=0, job_no=0)
        state |= dict(sampling_step=0, sampling_steps=0)
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    worker, order = min(found, key=lambda pair: pair[1].arrived)
    done, picture = await worker.progress(order, not skip_current_image)
    share = done / max(order.steps, 1)
    spent, steps = time.monotonic() - order.arrived, order.requests[0].plan.steps
    state = dict(skipped=False, interrupted=order.cancelled, job="image", job_count=order.images)
    state |= dict(job_no=done // steps, sampling_step=done % steps, sampling_steps=steps)
    image = None if picture is None else base64_of(await asyncio.to_thread(encoded, picture))
    eta = spent / share - spent if share else 0.0
    return {"progress": share, "eta_relative": eta, "state": state, "current_image": image, "textinfo": None}


@router.post("/interrupt")
async def interrupt(request: Request) -> Any:
    """Drop the oldest order in the making, as the button of the web UI does."""
    found = [order for worker in request.app.state.models.values() for order in worker.orders]
    if found:
        min(found, key=lambda order: order.arrived).cancel()
    return {}


@router.get("/options")
async def options(request: Request) -> Any:
    """The model that is meant where a request names none."""
    state = request.app.state
    return {"sd_model_checkpoint": state.models.named(state.checkpoint).name, "samples_format": "png"}


@router.post("/options")
async def set_options(body: dict[str, Any], request: Request) -> Any:
    """Mean another model where a request names none."""
    if strange := sorted(set(body) - {"sd_model_checkpoint"}):
        raise UserError(f"option {strange[0]!r} cannot be set", "sd_model_checkpoint can")
    if "sd_model_checkpoint" in body:
        request.app.state.checkpoint = request.app.state.models.named(body["sd_model_checkpoint"]).name
    return {}


@router.get("/sd-models")
async def sd_models(request: Request) -> Any:
    """The models that were loaded."""
    loaded: Models = request.app.state.models

    def entry(worker: Maker) -> dict[str, Any]:
        digest = worker.digest
        own = dict(title=worker.name, model_name=worker.name, hash=digest[:10], sha256=digest)
        return own | dict(filename=worker.name, config=None)

    return await asyncio.to_thread(lambda: [entry(worker) for worker in loaded.values()])


@router.get("/samplers")
async def samplers() -> Any:
    """A1111's names, and ours."""
    named = [{"name": name, "aliases": [ours], "options": {}} for name, ours in NAMES.items()]
    rest = [name for name in SAMPLERS if name not in NAMES.values()]
    return named + [{"name": name, "aliases": [name], "options": {}} for name in rest]


@router.get("/schedulers")
async def schedulers() -> Any:
    """Spacings of the noise levels."""
    return [{"name": name, "label": name.capitalize()} for name in ("automatic", *SIGMAS)]


@router.get("/loras")
async def loras(request: Request) -> Any:
    """LoRA files that the server was started with."""
    names = {name for worker in request.app.state.models.values() for name in worker.loras}
    return [{"name": name, "alias": name} for name in sorted(names)]
