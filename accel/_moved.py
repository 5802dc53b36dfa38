"""Import paths of 0.1, kept importable: most modules were loose files in `accel/`, `export/` and `distill/` then.

`import accel.source` gives `accel.models.source` and a DeprecationWarning. To be dropped with 0.3.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

# Package then > package now: name then=name now, or a name alone where it stayed.
_MOVED = """
accel > accel.bench: sheet=contact_sheet report report_html=page floor=roofline
accel > accel.bundle: profiles=shape_profiles tensors=tensor_spec graph=graph_file
accel.engines > accel.engines: loop=fixed_loop
accel.engines > accel.providers: providers=built_in
accel.engines > accel.trt: workspace captured=cuda_graphs
accel > accel.int8: int8_attention=attention int8_file=trained_scales int8_packed=packed int8_ranges=observers
accel > accel.int8: int8_recipe=config int8_verdict=summary
accel > accel.models: source checkpoint=single_file weights=weight_files lora topology networks control_networks
accel > accel.pipeline: request start=initial_latents conditioning control components=lazy_engines
accel > accel.text: tokenizer prompts
accel > accel.attaching: embedding=attached
accel > accel.sampling: sampler=samplers solvers noise_schedule noise
accel > accel.trt: plans=engine_files preflight trust cuda
accel > accel: pictures=images
accel.distill > accel.distill.data: placement=crop examples cache make_cache encode=encoders draws=rng
accel.distill > accel.distill.data: processes=distributed
accel.distill > accel.distill.diffusion: losses denoising inpainting
accel.distill > accel.distill.digits: train_digits=train digits_card=card
accel.distill > accel.distill.edm: edm_sampler=sampler edm_weights=weights
accel.distill > accel.distill.evaluation: evaluate metrics protocols makers=generators shards=work_share
accel.distill > accel.distill.evaluation: digits_quality=digits
accel.distill > accel.distill.few_step: dmd2 gan=critic adapters=shared_lora text_to_image class_to_image regression
accel.distill > accel.distill.few_step: pairs=ode_pairs plan=memory
accel.distill > accel.distill.methods: kd students features lora dreambooth tiny_vae qat
accel.distill > accel.distill.sources: items=item folder_source=folder tar_source=webdataset
accel.distill > accel.distill.sources: dataset_source=hf_datasets
accel.distill > accel.distill.training: train=loop checkpoints stop attention samples pipelines
accel.distill > accel.distill.watching: log symptoms=monitors
accel.distill > accel.distill.from_nothing: fit
accel.export > accel.models: constants
accel.export > accel.export: companions=pipeline_files share=hard_links
accel.export > accel.export.graph: component onnx=trace check precision islands=fp32_fallback float16=fp16_reference
accel.export > accel.export.graph: half=fp16 uint8
accel.export > accel.export.int8: int8_options=settings quantize calibration sensitivity parity=image_parity
accel.export > accel.export.int8: gate=acceptance verdict=speed int8_audit=audit int8_limits=unsupported
accel.export > accel.export.tensorrt: plan_audit=audit operators memory shapes timing_cache
accel.export > accel.export.triton: triton_server=repository
accel.export > accel.bundle: row_timesteps
"""
TABLE = {
    f"{then}.{pair.partition('=')[0]}": f"{now}.{pair.rpartition('=')[2]}"
    for then, now, *pairs in (line.replace(":", "").replace(">", "").split() for line in _MOVED.strip().splitlines())
    for pair in pairs
}


class _Redirect(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in TABLE else None

    def exec_module(self, module) -> None:
        old = module.__name__
        warnings.warn(f"{old} is now {TABLE[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(TABLE[old])

    def get_code(self, name):
        """For `python -m OLD.NAME`."""
        new = TABLE[name]
        print(f"note: {name} is now {new}", file=sys.stderr)
        return compile(f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)", name, "exec")


def install() -> None:
    sys.meta_path.append(_Redirect())
