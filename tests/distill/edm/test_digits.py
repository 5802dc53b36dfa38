"""EDM end to end on real images: a small ADM network learns scikit-learn's digits and draws the ones asked for."""

import pytest
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from accel.distill.edm import preconditioning
from accel.distill.edm.sampler import Churn, one_step, sample

STEPS = 200


@pytest.mark.slow
def test_a_trained_network_draws_the_class_asked_for_with_the_datas_variety():
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    classes = torch.tensor(digits.target)
    reader = SVC(gamma=0.02).fit(images.flatten(1).numpy(), classes)
    torch.manual_seed(0)
    config = preconditioning.unet_config(
        size=8, channels=1, width=32, multipliers=(1, 2), layers=1, attention=(4,), head_width=32, classes=10
    )
    net = preconditioning.Preconditioned(UNet2DModel(**config), sigma_data=float(images.std()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (128,))
        x0, sigma = images[rows], (1.2 * torch.randn(128) - 1.2).exp()  # levels as in arXiv 2206.00364, table 1
        said = net(preconditioning.add_noise(x0, torch.randn_like(x0), sigma), sigma, classes[rows])
        loss = (preconditioning.loss_weight(sigma, net.sigma_data).view(-1, 1, 1, 1) * (said - x0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    net.eval()
    asked, z = torch.arange(200) % 10, torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        drawn = {
            "heun": sample(net, z, asked, steps=18),
            "churn": sample(net, z, asked, steps=32, churn=Churn(10)),
            "one step": one_step(net, z, asked),
        }

    def variety(made: torch.Tensor, labels: torch.Tensor) -> float:
        """Standard deviation within a class, over all pixels."""
        return float(torch.stack([made[labels == number].var(0).mean() for number in range(10)]).mean().sqrt())

    read = {name: float(reader.score(made.flatten(1).numpy(), asked.numpy())) for name, made in drawn.items()}
    varied = {name: variety(made, asked) / variety(images, classes) for name, made in drawn.items()}
    assert min(read.values()) > 0.85, read
    assert 0.8 < varied["heun"] < 1.2 and 0.8 < varied["churn"] < 1.2, varied
    # One step of the undistilled teacher is the mean of the class: right, and always the same. DMD2 is to mend that.
    assert varied["one step"] < 0.5, varied
