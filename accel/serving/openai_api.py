"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`, with our extensions as siblings."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..errors import UserError
from ..images import decoded
from .exchange import Exchange
from .guards import error_of
from .models import Maker, Models
from .pictures import Shelf, base64_of, encoded, painted

router = APIRouter(prefix="/v1")
SEEDS = 2**63


class Lora(BaseModel):
    """A LoRA file that the server was started with."""

    model_config = ConfigDict(extra="forbid")
    name: str
    scale: float = Field(1.0, allow_inf_nan=False)


class Generation(BaseModel):
    """The body of `/v1/images/generations`; what follows `moderation` is accel's."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: str | None = None
    n: int | None = None
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: str | None = None
    # What these ask for beside their default, no model here can do.
    quality: Literal["auto", "standard"] | None = None
    style: Literal["vivid"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    sampler: str | None = None
    lora: str | list[str | Lora] | None = None

    def call(self) -> dict[str, Any]:
        """The arguments of a pipeline's call."""
        width, height = (None, None) if self.size in (None, "auto") else map(int, str(self.size).split("x"))
        return dict(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or None,
            num_images_per_prompt=1 if self.n is None else self.n,
            width=width,
            height=height,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
        )

    @property
    def loras(self) -> list[Any]:
        """Names, or (name, scale)."""
        given = [self.lora] if isinstance(self.lora, str) else self.lora or []
        return [(one.name, one.scale) if isinstance(one, Lora) else one for one in given]


class Edit(Generation):
    """The fields of `/v1/images/edits` that are no files."""

    input_fidelity: Literal["low"] | None = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None


@router.get("/models")
async def models(request: Request) -> Any:
    """The models that were loaded."""
    loaded: Models = request.app.state.models
    entries = [{"id": name, "object": "model", "created": loaded.since, "owned_by": "accel"} for name in loaded]
    return {"object": "list", "data": entries}


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> Any:
    """One of them."""
    loaded: Models = request.app.state.models
    return {"id": loaded.named(name).name, "object": "model", "created": loaded.since, "owned_by": "accel"}


@router.post("/images/generations")
async def generations(body: Generation, request: Request) -> Any:
    """Images of a prompt."""
    return await _answered(body, body.call(), "image_generation", request)


@router.post("/images/edits")
async def edits(request: Request) -> Any:
    """An image anew by a prompt; with a mask, only where that is transparent (or white, where it has no alpha)."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("an edit is sent as multipart/form-data", "curl -F image=@photo.png -F prompt=...")
    async with request.form(max_files=16, max_fields=64, max_part_size=1 << 20) as form:
        fields, files = {}, {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            elif name in files:
                raise UserError(f"several files {name}", "send one image, and at most one mask")
            else:
                files[name] = await value.read()
    if "lora" in fields and fields["lora"][:1] in "[{":
        fields["lora"] = _json(fields["lora"])
    body = TypeAdapter(Edit).validate_python(fields)
    strange = sorted(set(files) - {"image", "image[]", "mask"})
    if strange:
        raise UserError(f"unknown file {strange[0]!r}", "send image and mask")
    given = [files[name] for name in ("image", "image[]") if name in files]
    if len(given) != 1:
        raise UserError(f"{len(given)} images to edit", "send one file named image")
    call = body.call() | {"strength": body.strength}
    call["image"] = (await asyncio.to_thread(decoded, given[0], "image")).convert("RGB")
    if "mask" in files:
        call["mask_image"] = painted(await asyncio.to_thread(decoded, files["mask"], "mask"))
    return await _answered(body, call, "image_edit", request)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"lora is not JSON: {text[:80]!r}", "a name, or a list of names") from None


async def _answered(body: Generation, call: dict[str, Any], event: str, request: Request) -> Any:
    worker: Maker = request.app.state.models.named(body.model)
    partial = (body.partial_images or 0) if body.stream else 0
    if body.partial_images and not body.stream:
        raise UserError("partial_images without stream: nobody would see them", "add stream: true")
    exchange = await Exchange.open(worker, call, partial=partial, loras=body.loras)
    width, height = exchange.order.requests[0].pixels[::-1]
    about = {"size": f"{width}x{height}", "output_format": body.output_format or "png"}
    about |= {"quality": body.quality or "auto", "background": "opaque"}
    if body.stream:
        return StreamingResponse(
            _streamed(exchange, body, event, about),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
    done = await exchange.images(request)
    data = [{**await _data(image, body, request), "seed": image.seed} for image in done]
    return JSONResponse({"created": int(time.time()), "data": data, **about})


async def _data(image: Any, body: Generation, request: Request) -> dict[str, str]:
    kind = body.output_format or "png"
    file = await asyncio.to_thread(encoded, image.image, kind, body.output_compression)
    if body.response_format == "url":
        shelf: Shelf = request.app.state.shelf
        return {"url": str(request.url_for("fetch", name=shelf.put(file, kind)))}
    return {"b64_json": base64_of(file)}


async def _streamed(exchange: Exchange, body: Generation, event: str, about: Mapping[str, Any]) -> AsyncIterator[str]:
    """Server-sent events: partial images as they come, and each image when it is done."""
    shown: dict[int, int] = {}
    try:
        async for found in exchange.events():
            kind = "completed" if found.kind == "image" else "partial_image"
            file = await asyncio.to_thread(encoded, found.image, body.output_format or "png", body.output_compression)
            message = {"type": f"{event}.{kind}", "created_at": int(time.time()), "b64_json": base64_of(file), **about}
            if kind == "partial_image":
                message["partial_image_index"] = shown.get(found.index, 0)
                shown[found.index] = shown.get(found.index, 0) + 1
            else:
                message["seed"] = found.seed
            if exchange.order.images > 1:
                message["image_index"] = found.index
            yield f"event: {message['type']}\ndata: {json.dumps(message)}\n\n"
    except Exception as error:
        message = {"type": "error", **{"error": error_of(error)["error"]}}
        yield f"event: error\ndata: {json.dumps(message)}\n\n"
