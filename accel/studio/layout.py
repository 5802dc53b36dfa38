"""The page of the studio, in Gradio: fields, two images, the map between them, history."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from typing import Any

from ..bench.page.difference import gradient
from ..errors import MissingPackage, UserError
from . import history
from .compare import Engines, Pair, compare
from .question import Choices, asked

FIELDS = (
    *("model", "engine_a", "engine_b", "prompts", "negative", "seed", "steps", "guidance", "height", "width"),
    *("loras", "scale", "image", "strength"),
)
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
#a img, #b img, #map img { width: 100%; height: 100%; image-rendering: pixelated; object-fit: contain; }
#a button, #b button, #map button { max-width: 100%; }
.status { font-size: 1.125rem; line-height: 1.4; } .status.wrong { color: #b42318; }
.dark .status.wrong { color: #f5a097; }
.took { font-weight: 600; font-variant-numeric: tabular-nums; min-height: 1.5em; }
#history .wrap { flex-direction: column; align-items: stretch; }
.range { display: flex; gap: .6rem; align-items: center; } .range i { flex: 1; height: .7rem; border-radius: 2px; }
footer { display: none !important; }
"""


def layout(choices: Choices, engines: Engines, prompt: str = "") -> Any:
    """The page as `gradio.Blocks`.

    Args:
        choices: what the fields offer.
        engines: draws.
        prompt: in the field at first.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
    try:
        import gradio as gr
    except ImportError:
        raise MissingPackage("gradio", "accel studio", "studio") from None

    with gr.Blocks(analytics_enabled=False, title="accel studio", fill_width=True) as page:
        gr.Markdown("# accel studio\nOne prompt, one seed, two engines: is it faster, and is it the same image?")
        with gr.Row():
            with gr.Column(scale=3):
                prompts = gr.Textbox(prompt, label="Prompt (several lines: a batch)", lines=2, elem_id="prompts")
                negative = gr.Textbox(label="Negative prompt", lines=1)
                with gr.Row():
                    model = gr.Dropdown(list(choices.models), value=choices.models[0], label="Model", min_width=240)
                    engine_a, engine_b = (
                        gr.Dropdown(list(choices.engines), value=value, label=label, min_width=200)
                        for value, label in ((choices.engines[0], "Engine A"), (choices.engines[-1], "Engine B"))
                    )
                go = gr.Button("Draw on both", variant="primary", elem_id="go")
            with gr.Column(scale=2):
                with gr.Row():
                    seed = gr.Textbox("0", label="Seed", min_width=80, elem_id="seed")
                    steps = gr.Textbox(label="Steps", placeholder="auto", min_width=80, elem_id="steps")
                    guidance = gr.Textbox(label="Guidance", placeholder="auto", min_width=80)
                with gr.Row():
                    height = gr.Textbox(label="Height, px", placeholder="auto", min_width=80)
                    width = gr.Textbox(label="Width, px", placeholder="auto", min_width=80)
                with gr.Accordion("LoRA, image to start from", open=False):
                    loras = gr.Dropdown(list(choices.loras), value=[], multiselect=True, label="LoRA files (--lora)")
                    scale = gr.Slider(-2, 2, value=1, step=0.05, label="LoRA strength")
                    image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=200)
                    strength = gr.Slider(0, 1, value=0.8, step=0.05, label="Strength: how much of it changes")
        status = gr.HTML(_status("Ready."), elem_id="status")
        shown = {}
        with gr.Row():
            for side in "ab":
                with gr.Column(min_width=240):
                    image_of = gr.Image(
                        label=f"Engine {side.upper()}",
                        format="png",
                        height=320,
                        interactive=False,
                        elem_id=side,
                        buttons=["download"],
                    )
                    shown[side] = image_of, gr.HTML(_took(), elem_id=f"took-{side}")
            with gr.Column(min_width=240):
                difference = gr.Image(
                    label="Where they differ",
                    format="png",
                    height=320,
                    interactive=False,
                    elem_id="map",
                    buttons=["download"],
                )
                scale_of = gr.HTML("", elem_id="scale")
        with gr.Accordion("The command to type", open=False):
            commands = gr.Code(language="shell", label="Both engines", interactive=False, elem_id="commands")
        kept = gr.State([])
        table = gr.Radio([], type="index", label="History: choose a line to ask it again", elem_id="history")
        fields = [
            *(model, engine_a, engine_b, prompts, negative, seed, steps, guidance, height, width),
            *(loras, scale, image, strength),
        ]
        outputs = [status, *shown["a"], *shown["b"], difference, scale_of, commands, kept, table]

        def draw(past: list[Pair], *values: Any) -> Iterator[tuple[Any, ...]]:
            yield from drawing(choices, engines, past, dict(zip(FIELDS, values, strict=True)))

        def again(past: list[Pair], line: int | None) -> list[Any]:
            found = history.fields(past[line or 0].question)
            return [found[name] for name in FIELDS[: len(found)]]

        how = dict(api_visibility="private", concurrency_id="draw", concurrency_limit=1)
        go.click(draw, [kept, *fields], outputs, show_progress="minimal", **how)
        table.input(again, [kept, table], fields[:10], **how)
    page.queue(max_size=8, api_open=False, default_concurrency_limit=1)
    return page


def drawing(choices: Choices, engines: Engines, past: list[Pair], values: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What the page shows while it draws: status, image and time of A and of B, map, scale, commands, history, lines.

    Nonsense, and what a model cannot do, is a sentence in the status and no exception.
    """
    pair: Pair | None = None
    try:
        questions = asked(choices, values)
        for i, question in enumerate(questions):
            where = f"{i + 1} of {len(questions)}: " if len(questions) > 1 else ""
            for pair in compare(engines, question):
                if pair.b:
                    past = history.add(past, pair)
                yield _shown(_status(_said(pair, where)), pair, past)
    except UserError as error:
        fix = f" To put it right: {error.fix}." if error.fix else ""
        yield _shown(_status(f"{error.message}.{fix}", wrong=True), pair, past)


def _said(pair: Pair, where: str) -> str:
    if pair.verdict:
        notes = [*pair.a.notes, *pair.b.notes]  # type: ignore[union-attr]
        return where + pair.verdict + "".join(f" Note: {note}." for note in dict.fromkeys(notes))
    return f"{where}drawing on {pair.question.engines[1 if pair.a else 0]} …"


def _shown(status: str, pair: Pair | None, past: list[Pair]) -> tuple[Any, ...]:
    a, b = (pair.a, pair.b) if pair else (None, None)
    commands = "\n".join(pair.question.command(engine) for engine in pair.question.engines) if pair else ""
    return (
        status,
        *(a.image if a else None, _took(a.caption if a else "")),
        *(b.image if b else None, _took(b.caption if b else "")),
        pair.map if pair else None,
        _scale(pair),
        commands,
        past,
        {"choices": [(line, line) for line in history.lines(past)], "value": None, "__type__": "update"},
    )


def _status(text: str, wrong: bool = False) -> str:
    return f'<p class="status{" wrong" * wrong}" role="{"alert" if wrong else "status"}">{escape(text)}</p>'


def _took(text: str = "") -> str:
    return f'<p class="took">{escape(text)}</p>'


def _scale(pair: Pair | None) -> str:
    found = pair.difference if pair else None
    if not found:
        return ""
    if not found.most:
        return '<p class="took">✓ Identical</p>'
    ground = f'<i style="background:{gradient()}"></i>'
    return f'<div class="range"><span>0</span>{ground}<span>{found.top} of 255</span></div>'
