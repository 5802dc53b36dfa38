"""Class to image, on any engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import to_host
from ..bundle import Bundle
from ..bundle.kinds import DENOISER
from ..engines.resource import Resource
from ..errors import UserError, unknown
from ..pipeline.lazy_engines import LazyEngines
from ..pipeline.output import OUTPUT_TYPES, Output, not_finite, of_type, table
from ..progress import progress as show_progress
from ..sampling.edm import solvers
from ..sampling.edm.levels import coefficients
from ..sampling.edm.solvers import Churn
from ..sampling.noise import normal
from .request import Request, complete


class ClassPipeline(Resource):
    """A loaded model of the EDM family. Make one with `accel.load`.

    Attributes:
        bundle: where it came from; `bundle.manifest.sampler` holds the default steps, `bundle.manifest.pipeline` the
            number of classes.
        engines: its network by name.
    """

    what, again = "pipeline", "accel.load(BUNDLE) loads one"

    def __init__(self, bundle: Bundle, engines: LazyEngines):
        self.bundle, self.engines = bundle, engines

    @property
    def classes(self) -> int:
        """How many classes there are to choose from; 0 for none."""
        return self.bundle.manifest.pipeline["classes"]

    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        churn: float | Churn | None = None,
        images_per_class: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        renoise: Callable[[int], Any] | None = None,
        output_type: str = "pil",
        progress: bool = False,
        **others: Any,
    ) -> Output:
        """Images of classes.

        Args:
            class_labels: the class of each image, 0 to `classes` - 1; None of a model without classes.
            sampler: "heun" (arXiv 2206.00364, algorithms 1 and 2) or "dmd2" (arXiv 2405.14867); None for the bundle's.
            steps: of heun; None for the bundle's.
            churn: S_churn of heun, at the levels and with the noise of EDM's ImageNet figure; or a `Churn`.
            images_per_class: how many of each.
            seed: of the first image, the others count on; or one for each; None draws one.
            latents: standard normal noise to start from, [images, C, h, w], instead of the seeds'.
            renoise: step -> standard normal noise of that shape for churn, or between the steps of a student.
            output_type: "pil"; "np", float32 [N, h, w, 3] in 0..1; "pt"; or "latent", the same as x, [N, C, h, w] in
                about -1..1. Grey images have three equal channels, but as "latent".
            progress: show a bar on stderr.

        Returns:
            `latents` are the images as the sampler left them.

        Raises:
            UserError: for a class that is not there, a text, and images that are not finite.
        """
        self.check_open()
        if others:
            name = next(iter(others))
            fix = "pipe(7), with a class; help(pipe) says what else there is"
            raise UserError(f"{name} is for images of texts, and this model draws images of classes", fix)
        if output_type not in OUTPUT_TYPES:
            raise unknown("output_type", output_type, OUTPUT_TYPES)
        how: dict[str, Any] = dict(sampler=sampler, steps=steps, churn=churn, images_per_class=images_per_class)
        request = complete(self.bundle.manifest, class_labels, seed=seed, **how)
        began = time.perf_counter()
        with self.engines.turn():
            made = self._run(request, self._noise(request, latents, renoise), progress)
        seconds = time.perf_counter() - began
        if not np.isfinite(made).all():
            raise not_finite(self.bundle.manifest, self.engines.descriptions)
        x = made.astype(np.float32)
        pixels = None if output_type == "latent" else np.repeat(x, 3, 1) if x.shape[1] == 1 else x
        seconds_of = {DENOISER: seconds, "total": seconds}
        return Output(of_type(output_type, pixels, x), x, request.seeds if latents is None else [], seconds_of)

    @property
    def _shape(self) -> tuple[int, int, int]:
        values = self.bundle.manifest.pipeline
        return values["latent_channels"], values["native_size"], values["native_size"]

    def _noise(
        self, request: Request, latents: Any, renoise: Callable[[int], Any] | None
    ) -> Callable[[int, slice], np.ndarray]:
        """(draw, rows) -> standard normal noise of those images: draw 0 is what they start from, i + 1 is step i's."""
        wanted = (len(request.seeds), *self._shape)
        given = None if latents is None else np.asarray(to_host(latents), np.float64)
        if given is not None and given.shape != wanted:
            raise UserError(f"latents of shape {given.shape}, where {wanted} are needed", "give one per image")

        def draw(number: int, rows: slice) -> np.ndarray:
            if number == 0 and given is not None:
                return given[rows]
            if number and renoise is not None:
                return np.asarray(to_host(renoise(number - 1)), np.float64)[rows]
            return normal(request.seeds[rows], number, self._shape).astype(np.float64)

        return draw

    def _run(self, request: Request, noise: Callable[[int, slice], np.ndarray], progress: bool) -> np.ndarray:
        chunks = list(_chunks(len(request.seeds), self.engines[DENOISER].component.dims["images"].max))
        done = 0
        with show_progress("sampling", steps=request.calls * len(chunks), shown=progress) as report:

            def images(rows: slice) -> np.ndarray:
                labels = None if request.labels is None else np.asarray(request.labels[rows], np.int64)

                def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
                    nonlocal done
                    made = self.denoised(x, sigma, labels)
                    done += 1
                    report("", done)
                    return made

                def renoise(step: int) -> np.ndarray:
                    return noise(step + 1, rows)

                x = request.sigmas[0] * noise(0, rows)
                if request.sampler == "heun":
                    return solvers.heun(denoise, x, request.sigmas, renoise, request.churn)
                return solvers.renoised(denoise, x, request.sigmas, renoise)

            made = [images(rows) for rows in chunks]
        self.engines.phase_over([DENOISER])
        return np.concatenate(made)

    def denoised(self, x: np.ndarray, sigma: float, labels: np.ndarray | None = None) -> np.ndarray:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv 2206.00364, equation 7): F on the engine.

        Args:
            x: noisy images, float64 [n, C, h, w].
            sigma: their noise level, above 0.
            labels: classes, int64 [n].

        Returns:
            The denoised images, float64 [n, C, h, w].
        """
        engine = self.engines[DENOISER]
        c_skip, c_out, c_in, c_noise = coefficients(sigma, self.bundle.manifest.pipeline["sigma_data"])
        spec, rows = engine.component.inputs[0], len(x)
        feeds: dict[str, Any] = {"sample": (c_in * x).astype(spec.dtype)}
        feeds["c_noise"] = np.full(rows, c_noise, np.float32)
        if labels is not None:
            feeds["class_labels"] = labels
        least = engine.component.dims["images"].min
        if rows < least:  # a fixed batch is filled with the last image, and what that makes is dropped
            feeds = {name: np.concatenate([value, *[value[-1:]] * (least - rows)]) for name, value in feeds.items()}
        said = to_host(engine(**feeds)["out_sample"])[:rows]
        return c_skip * x + c_out * np.asarray(said, np.float64)

    def release(self) -> None:
        self.engines.close()

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name:<12} {text}" for name, text in self._parts().items())
        return f"<ClassPipeline{' (closed)' * self.closed} {self.bundle.title}{rows}>"

    def _repr_html_(self) -> str:
        return table(f"ClassPipeline{' (closed)' * self.closed} {self.bundle.title}", self._parts())

    def _parts(self) -> dict[str, str]:
        return {name: self.engines.descriptions.get(name, "loaded in its phase") for name in self.engines}


def _chunks(count: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + most, count)) for start in range(0, count, most))
