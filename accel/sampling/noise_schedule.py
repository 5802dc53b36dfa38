"""The forward process as data: alpha_bar over the training timesteps, and what a scheduler's config says of sampling.

    q(x_t | x_0) = N( sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I )                              (DDPM, arXiv 2006.11239)

`sigma` is the variance-exploding one, sqrt((1 - alpha_bar) / alpha_bar); lambda_t = -log sigma is half the log
signal-to-noise ratio. Coefficients are float64 and leave here as Python floats, so that multiplying an array by them
keeps the array's dtype, in numpy and in torch alike. The betas of a config are rounded to float32 on the way, as they
were when the model was trained on them: alpha_bar is diffusers' to the last bit or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import parse_json, read_bytes
from . import scheduler_config
from .scheduler_config import refused

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
SPACINGS = ("leading", "trailing", "linspace")

# A zero terminal signal-to-noise ratio makes sigma infinite; solvers in sigma use the smallest fp16 number instead.
ALPHA_BAR_FLOOR = 2.0**-24


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSchedule:
    """Noise level of every training timestep, and the choices that turn a step count into a grid.

    Attributes:
        alphas_cumprod: alpha_bar, float64 [T], strictly decreasing, within [0, 1); a read-only copy.
        prediction_type: what the model predicts: `epsilon`, `v_prediction` (arXiv 2202.00512), `sample` (x0), or
            `flow_prediction` (eps - x0).
        timestep_spacing: `leading`, `trailing` or `linspace` (arXiv 2305.08891, table 2). None: the sampler's default.
        steps_offset: added to every timestep of the `leading` grid.
        set_alpha_to_one: whether DDIM's last step lands on alpha_bar = 1 rather than on alpha_bar[0].
        config: the scheduler config that this was read from; samplers find their other fields there.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        a = np.array(self.alphas_cumprod, dtype=np.float64)
        if a.ndim != 1 or a.size == 0 or not np.isfinite(a).all() or a.max() >= 1 or a.min() < 0:
            raise UserError("alphas_cumprod must be numbers of at least 0 and below 1", "check the scheduler's betas")
        if not (np.diff(a) < 0).all():
            raise UserError("alphas_cumprod must fall at every timestep", "check the scheduler's betas")
        _one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _one_of("timestep_spacing", self.timestep_spacing, (*SPACINGS, None))
        a.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", a)

    @property
    def T(self) -> int:  # noqa: N802 (the papers' name)
        """Number of training timesteps."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: float) -> float:
        """alpha_bar at timestep t. Between two timesteps sigma is interpolated, as the Euler sampler needs it."""
        if not 0 <= t <= self.T - 1:
            raise UserError(f"timestep {t} is outside 0..{self.T - 1}", "use timesteps of this noise schedule")
        if t == int(t):
            return float(self.alphas_cumprod[int(t)])
        low = int(t)
        sigma = (1 - (t - low)) * self.sigma(low) + (t - low) * self.sigma(low + 1)
        return 1 / (1 + sigma**2)

    def sigma(self, t: float) -> float:
        """Variance-exploding noise level sqrt((1 - alpha_bar) / alpha_bar) at timestep t; finite also at zero SNR."""
        a = self.alpha_bar(t) or ALPHA_BAR_FLOOR
        return math.sqrt((1 - a) / a)

    @property
    def fields(self) -> dict[str, Any]:
        """The config with what the attributes say in place of what it says itself."""
        own = dict(
            num_train_timesteps=self.T,
            prediction_type=self.prediction_type,
            timestep_spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
            set_alpha_to_one=self.set_alpha_to_one,
        )
        return dict(self.config) | own

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the contents of a diffusers `scheduler_config.json`, for sampling with `samplers.sample`.

        Raises:
            UserError: naming the field, where one is not known or has a wrong type. What a sampler cannot honour is
                refused when its table is made (`samplers.table`).
        """
        scheduler_config.check(config)
        name = str(config.get("_class_name", ""))
        picked = ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one")
        return cls(
            alphas_cumprod=_alphas_cumprod(config),
            config=dict(config),
            **{"set_alpha_to_one": name != "PNDMScheduler"}
            | {field: config[field] for field in picked if config.get(field) is not None},
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """As `from_scheduler`, for whoever takes the forward process alone.

        Raises:
            UserError: also where the scheduler clips its predictions, as its config or its class's default says:
                alpha_bar cannot carry that.
        """
        made = cls.from_scheduler(config)
        if clipped := scheduler_config.clips(config):
            raise UserError(
                f"scheduler config: {clipped} = True is for the sampler, which a noise schedule alone knows nothing of",
                f'sample with NoiseSchedule.from_scheduler, which keeps it, or write "{clipped}": false',
            )
        return made

    @classmethod
    def of_training(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The forward process and the prediction type of a scheduler's config: what training reads of it.

        Fields that samplers alone read (Karras sigmas, algorithm types, clipping and others) do not matter here.

        Raises:
            UserError: for betas or a prediction type that are not known.
        """
        return cls.from_scheduler({name: config[name] for name in scheduler_config.FORWARD if name in config})

    @classmethod
    def from_folder(cls, path: str | Path) -> NoiseSchedule:
        """Reads `scheduler_config.json` from a diffusers `scheduler/` folder, as `from_scheduler` does."""
        file = Path(path) / "scheduler_config.json"
        try:
            if not file.exists():
                raise UserError(f"{file} is missing", "point at the scheduler folder of a diffusers pipeline")
            config = parse_json(read_bytes(file, "the scheduler's config", 1 << 20))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}", "write it again from the original pipeline") from None
        if not isinstance(config, dict):
            raise UserError(f"{file} does not hold a JSON object", "write it again from the original pipeline")
        return cls.from_scheduler(config)


def add_noise(schedule: NoiseSchedule, x0: Any, eps: Any, t: float) -> Any:
    """A draw of q(x_t | x_0): sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Arrays of one shape and dtype."""
    a = schedule.alpha_bar(t)
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * eps


def training_betas(config: Mapping[str, Any]) -> list[float]:
    """beta_t of a scheduler config, T numbers in float32 precision, before `rescale_betas_zero_snr`."""
    plain: dict[str, Any] = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    defaults = scheduler_config.CLASSES.get(str(config.get("_class_name", "")), {})
    made = plain | defaults | {name: value for name, value in config.items() if value is not None}
    steps = made["num_train_timesteps"]
    if made.get("trained_betas") is not None:
        beta = np.asarray(made["trained_betas"], dtype=np.float32)
        if beta.shape != (steps,):
            raise refused("trained_betas", f"of length {beta.size}", f"give num_train_timesteps = {steps} numbers")
    else:
        beta = _betas(made["beta_schedule"], float(made["beta_start"]), float(made["beta_end"]), steps)
    if not ((beta > 0) & (beta < 1)).all():
        raise refused("trained_betas / beta_start / beta_end", "with values outside (0, 1)", "check the betas")
    return beta.tolist()


def _alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """alpha_bar of a config, float64 [T] with float32 values."""
    a = _cumprod(1 - np.array(training_betas(config), np.float32))
    return (_rescale_zero_snr(a) if config.get("rescale_betas_zero_snr") else a).astype(np.float64)


def _cumprod(alpha: np.ndarray) -> np.ndarray:
    """Running products float32 [T] of float32 numbers, multiplied in float64."""
    return np.cumprod(alpha, dtype=np.float64).astype(np.float32)


def _betas(kind: str, low: float, high: float, steps: int) -> np.ndarray:
    """beta_t, float32 [T]."""
    if kind == "linear":
        return np.linspace(low, high, steps).astype(np.float32)
    if kind == "scaled_linear":  # linear in sqrt(beta), latent diffusion (arXiv 2112.10752)
        return np.linspace(low**0.5, high**0.5, steps).astype(np.float32) ** 2
    if kind == "sigmoid":  # GeoDiff (arXiv 2203.02923)
        return (1 / (1 + np.exp(-np.linspace(-6, 6, steps))) * (high - low) + low).astype(np.float32)
    u = np.arange(steps + 1) / steps
    if kind == "squaredcos_cap_v2":  # improved DDPM (arXiv 2102.09672), eq. 17; beta capped at 0.999
        f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    elif kind == "exp":
        f = np.exp(-12.0 * u)
    elif kind == "laplace":  # arXiv 2407.03297
        snr = np.exp(-0.5 * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
        f = np.sqrt(snr / (1 + snr))
    else:
        raise refused("beta_schedule", kind, "use linear, scaled_linear, squaredcos_cap_v2 or trained_betas")
    return np.minimum(1 - f[1:] / f[:-1], 0.999).astype(np.float32)


def _rescale_zero_snr(a: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last one is 0 and the first stays (arXiv 2305.08891, algorithm 1)."""
    if len(a) < 2:
        raise refused("rescale_betas_zero_snr", True, "it needs at least 2 training timesteps")
    root = np.sqrt(a)
    a = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return _cumprod(1 - (1 - np.concatenate([a[:1], a[1:] / a[:-1]])))  # by way of the betas, rounded like them


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise refused(name, value, "use one of " + ", ".join(str(v) for v in allowed if v is not None))
