"""A bundle as blocks of a modular pipeline of diffusers: what `block.py` of a repository imports.

pipe = diffusers.ModularPipeline.from_pretrained("user/name", trust_remote_code=True)
image = pipe(prompt="a fox in the snow", seed=7, output="images")[0]
"""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam

from ..pipeline import Pipeline
from .loader import load

_TAKEN = "prompt negative_prompt num_inference_steps guidance_scale height width num_images_per_prompt seed".split()
_TAKEN += "generator latents image mask_image strength output_type".split()


class AccelBlocks(ModularPipelineBlocks):
    """One block: a prompt becomes images, by the compiled networks of the bundle that the pipeline was loaded from.

    `engine` chooses what runs them, "auto" by default; the first call loads it. The other inputs are diffusers'.
    """

    model_name = "accel"

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Pipeline] = {}

    @property
    def description(self) -> str:
        return "Draws with the compiled networks of an accel bundle, with the steps and the guidance that it holds."

    @property
    def inputs(self) -> list[InputParam]:
        own = [InputParam(name, required=name == "prompt") for name in _TAKEN]
        return [*own, InputParam("engine", default="auto", description="what runs the networks")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="as `output_type` says: PIL images by default")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        call = {name: value for name in _TAKEN if (value := getattr(block, name, None)) is not None}
        if block.engine not in self._loaded:
            self._loaded[block.engine] = load(components._pretrained_model_name_or_path, block.engine)
        block.images = self._loaded[block.engine](**call).images
        self.set_block_state(state, block)
        return components, state
