"""The forward process as data: alpha_bar over the training timesteps, and the grid a sampler walks.

    q(x_t | x_0) = N( sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I )                              (DDPM, arXiv 2006.11239)

`sigma` is the variance-exploding one, sqrt((1 - alpha_bar) / alpha_bar); lambda_t = -log sigma is half the log
signal-to-noise ratio. Coefficients are float64 and leave here as Python floats, so that multiplying an array by them
keeps the array's dtype, in numpy and in torch alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import parse_json, read_bytes

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

# A zero terminal signal-to-noise ratio makes sigma infinite; solvers in sigma use the smallest fp16 number instead.
_ALPHA_BAR_FLOOR = 2.0**-24

_READ = frozenset(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type "
    "timestep_spacing steps_offset set_alpha_to_one".split()
)
# Fields that change the image and that no sampler here implements: name -> the only values that can be honoured.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "clip_sample": (False, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "flow_shift": (1.0, None),
    "shift_terminal": (None,),
    "interpolation_type": ("linear", None),
    "timestep_type": ("discrete", None),
    "final_sigmas_type": ("zero", None),
    "lambda_min_clipped": (-math.inf, "-Infinity", "-inf", None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# A solver is chosen by name, not by the config, so these bind only a config that asks for DPM-Solver++ itself.
_ONLY_DPM: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", None),
    "solver_order": (2, None),
    "solver_type": ("midpoint", None),
    "lower_order_final": (True, None),
    "euler_at_final": (False, None),
}
# Without effect unless one of the fields above is switched on, or belonging to another solver.
_INERT = frozenset(
    "clip_sample_range sample_max_value dynamic_thresholding_ratio time_shift_type sigma_min sigma_max skip_prk_steps "
    "original_inference_steps timestep_scaling predict_x0 disable_corrector solver_p".split()
)


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSchedule:
    """Noise level of every training timestep, and the choices that turn a step count into a grid.

    Attributes:
        alphas_cumprod: alpha_bar, float64 [T], strictly decreasing, within [0, 1); a read-only copy.
        prediction_type: what the model predicts: `epsilon`, `v_prediction` (arXiv 2202.00512) or `sample` (x0).
        timestep_spacing: `leading`, `trailing` or `linspace` (arXiv 2305.08891, table 2). None: the sampler's default.
        steps_offset: added to every timestep of the `leading` grid.
        set_alpha_to_one: whether DDIM's last step lands on alpha_bar = 1 rather than on alpha_bar[0].
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True

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
        a = max(self.alpha_bar(t), _ALPHA_BAR_FLOOR)
        return math.sqrt((1 - a) / a)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the contents of a diffusers `scheduler_config.json`.

        Raises:
            UserError: naming the field, where a field asks for something no sampler here does, or is not known.
        """
        name = str(config.get("_class_name", ""))
        only = dict(_ONLY)
        if name in ("", "DPMSolverMultistepScheduler"):
            only |= _ONLY_DPM
        for field, value in config.items():
            if field.startswith("_") or field in _READ or field in _INERT:
                continue
            if field in only:
                if value not in only[field]:
                    raise _refused(field, value, f"set it to {only[field][0]!r}")
            elif field not in _ONLY_DPM:
                raise _refused(field, value, "remove the field if the noise schedule does not depend on it")
        defaults = {"set_alpha_to_one": name != "PNDMScheduler"}
        picked = ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one")
        return cls(
            alphas_cumprod=_alphas_cumprod(config, name),
            **defaults | {field: config[field] for field in picked if config.get(field) is not None},
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> NoiseSchedule:
        """Reads `scheduler_config.json` from a diffusers `scheduler/` folder."""
        file = Path(path) / "scheduler_config.json"
        try:
            if not file.exists():
                raise UserError(f"{file} is missing", "point at the scheduler folder of a diffusers pipeline")
            config = parse_json(read_bytes(file, "the scheduler's config", 1 << 20))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}", "write it again from the original pipeline") from None
        if not isinstance(config, dict):
            raise UserError(f"{file} does not hold a JSON object", "write it again from the original pipeline")
        return cls.from_config(config)


def add_noise(schedule: NoiseSchedule, x0: Any, eps: Any, t: float) -> Any:
    """A draw of q(x_t | x_0): sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Arrays of one shape and dtype."""
    a = schedule.alpha_bar(t)
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * eps


def _alphas_cumprod(config: Mapping[str, Any], name: str) -> np.ndarray:
    # LCM and TCD schedulers differ from the rest in the values that an absent field stands for.
    lcm = name in ("LCMScheduler", "TCDScheduler")
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 100_000:
        raise _refused("num_train_timesteps", steps, "use a whole number of at least 1, and at most 100000")
    if config.get("trained_betas") is not None:
        beta = np.asarray(config["trained_betas"], dtype=np.float64)
        if beta.shape != (steps,):
            raise _refused("trained_betas", f"of length {beta.size}", f"give num_train_timesteps = {steps} numbers")
    else:
        low = float(config.get("beta_start", 0.00085 if lcm else 0.0001))
        high = float(config.get("beta_end", 0.012 if lcm else 0.02))
        beta = _betas(config.get("beta_schedule", "scaled_linear" if lcm else "linear"), low, high, steps)
    if not ((beta > 0) & (beta < 1)).all():
        raise _refused("trained_betas / beta_start / beta_end", "with values outside (0, 1)", "check the betas")
    a = np.cumprod(1 - beta)
    return _rescale_zero_snr(a) if config.get("rescale_betas_zero_snr") else a


def _betas(kind: str, low: float, high: float, steps: int) -> np.ndarray:
    if kind == "linear":
        return np.linspace(low, high, steps)
    if kind == "scaled_linear":  # linear in sqrt(beta), latent diffusion (arXiv 2112.10752)
        return np.linspace(low**0.5, high**0.5, steps) ** 2
    if kind == "squaredcos_cap_v2":  # improved DDPM (arXiv 2102.09672), eq. 17; beta capped at 0.999
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    raise _refused("beta_schedule", kind, "use linear, scaled_linear, squaredcos_cap_v2 or trained_betas")


def _rescale_zero_snr(a: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last one is 0 and the first stays (arXiv 2305.08891, algorithm 1)."""
    if len(a) < 2:
        raise _refused("rescale_betas_zero_snr", True, "it needs at least 2 training timesteps")
    root = np.sqrt(a)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _one_of(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise _refused(field, value, "use one of " + ", ".join(str(v) for v in allowed if v is not None))


def _refused(field: str, value: Any, fix: str) -> UserError:
    return UserError(f"scheduler config: {field} = {value!r} is not supported", fix)
