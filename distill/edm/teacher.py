"""A small EDM teacher of scikit-learn's digits, from nothing: `python -m accel.distill.edm.teacher FOLDER`.

It is trained as EDM trains (Karras et al. 2022, arXiv 2206.00364, table 1, equation 8), on the 1,297 digits that are
not held out: what a newcomer distils, exports and runs without a download or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from accel.errors import UserError

from ..sources import digits
from .preconditioning import Preconditioned, add_noise, loss_weight, unet_config

STEPS, BATCH, PEAK = 200, 128, 2e-3
SIDES = (8, 16, 32)
_MEAN, _DEVIATION = -1.2, 1.2  # of log sigma in training


def images(size: int, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Grey digits [n, 1, size, size] in -1..1 and their classes [n], of a split of `accel.distill.sources.digits`."""
    large, classes = digits.dataset(split)
    return F.interpolate(large.mean(1, keepdim=True), size=(size, size), mode="area"), classes


def network(size: int, sigma_data: float) -> Preconditioned:
    """An ADM of 0.8 M random weights for grey images of ten classes."""
    from diffusers import UNet2DModel

    config = unet_config(
        size=size, channels=1, width=32, multipliers=(1, 2), layers=1, attention=(size // 2,), head_width=32, classes=10
    )
    return Preconditioned(UNet2DModel(**config), sigma_data=sigma_data)


def train(
    size: int = 8, steps: int = STEPS, seed: int = 0, progress: Callable[[str, float], None] = lambda text, done: None
) -> Preconditioned:
    """A trained teacher, in float32 on the CPU.

    Args:
        size: side of its images in pixels, one of `SIDES`.
        steps: of 128 images each.
        seed: of weights, noise and order.
        progress: called with a text and the number of steps done.

    Raises:
        UserError: for another size, or no steps.
    """
    if size not in SIDES or steps < 1:
        raise UserError(f"no teacher of {size} px in {steps} steps", f"a size of {', '.join(map(str, SIDES))}")
    shown, classes = images(size)
    torch.manual_seed(seed)
    net = network(size, float(shown.std()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(shown), (BATCH,))
        x0, sigma = shown[rows], (_DEVIATION * torch.randn(BATCH) + _MEAN).exp()
        said = net(add_noise(x0, torch.randn_like(x0), sigma), sigma, classes[rows])
        weight = loss_weight(sigma, net.sigma_data).view(-1, 1, 1, 1)
        loss = (weight * (said - x0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(f"loss {loss.item():.3f}", step + 1)
    return net.eval()


def main() -> None:
    """Train a small EDM teacher of scikit-learn's digits: seconds to minutes on a CPU."""
    import argparse

    from accel.files import new_folder
    from accel.progress import progress

    from .source import save_edm

    parser = argparse.ArgumentParser(prog="python -m accel.distill.edm.teacher", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=8, choices=SIDES, help="side of the images (default: 8)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} images (default: {STEPS})")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    args = parser.parse_args()
    try:
        with new_folder(args.folder, overwrite=args.overwrite) as folder:
            with progress("training", steps=args.steps) as report:
                net = train(args.size, args.steps, progress=report)
            save_edm(folder, net)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.folder} is ready: accel run {args.folder} --class 7")


if __name__ == "__main__":
    main()
