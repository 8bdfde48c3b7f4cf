"""Every method that learns works in half precision, which is how CUDA runs it."""

import pytest
import torch

from stsr.methods import method_class

_SMALL_DIFFUSION = {
    "widths": (16, 24),
    "image_widths": (8, 12),
    "feature_channels": 8,
    "gene_channels": 8,
    "embedding_channels": 16,
    "steps": 3,
}
SETTINGS = {
    "unet": {"widths": (8, 12), "factors": 5, "lr_channels": 8},
    "corrdiff": {
        "widths": (8, 12),
        "factors": 5,
        "lr_channels": 8,
        "directions": 2,
        "denoiser_widths": (8, 12),
    },
    "c3diff": {**_SMALL_DIFFUSION, "vector_channels": 8},
    "diffst": {**_SMALL_DIFFUSION, "attention_channels": 8},
}
# bfloat16 keeps 8 bits: 0.4 % per operation. Measured on these models: 0.1 % of the loss, 1.5 % of the gradient,
# 0.5 % of the prediction.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, PREDICTION_TOLERANCE = 0.01, 0.05, 0.02


def model(name, panel):
    torch.manual_seed(0)
    chosen = method_class(name)
    method = chosen(chosen.Config(**SETTINGS[name]), panel)
    for parameter in method.parameters():
        if not parameter.any():  # layers that start at zero would hide what reaches them
            torch.nn.init.normal_(parameter, std=0.05)
    return method


def trained_and_predicted(name, panel, batch, noise, half):
    """Loss (), gradients of all parameters as one vector, and predicted counts."""
    method = model(name, panel).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = method.loss(batch, 0.9, torch.Generator().manual_seed(3))["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    method.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        features = method.condition(batch)
        counts = method.predict(batch, noise, features, method.draw(batch, features, noise))
    return loss.detach(), gradient, counts


def relative_error(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_is_close_to_single(name, panel, tiles, at):
    batch = tiles(3)
    batch = batch.without_lr(torch.tensor([False, True, False]))
    single, half = (trained_and_predicted(name, panel, batch, at(batch), on) for on in (False, True))
    assert all(part.isfinite().all() for part in half)
    assert not torch.equal(single[2], half[2])  # autocast was active
    for found, expected, tolerance in zip(
        half, single, (LOSS_TOLERANCE, GRADIENT_TOLERANCE, PREDICTION_TOLERANCE), strict=True
    ):
        assert relative_error(found, expected) < tolerance
