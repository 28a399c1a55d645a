"""VAEs: layer sizes follow from the image shape, and the evidence lower bound is that of the literature."""

import math

import pytest
import torch
from networks import small_vae

from clarity.vae import LOSSES, VAE, VAES, VAEConfig, elbo, vae_config

SHAPES = [(1, 28, 28), (1, 8, 12), (3, 33, 18), (3, 64, 64)]


@pytest.mark.parametrize("architecture", VAES)
@pytest.mark.parametrize("shape", SHAPES)
def test_vae_shapes_follow_from_the_image(architecture: str, shape: tuple[int, int, int]) -> None:
    vae = small_vae(architecture, shape)
    mean, log_var = vae.encode(torch.rand(4, *shape))
    assert mean.shape == log_var.shape == (4, 5)
    x = vae.decode(mean)
    assert x.shape == (4, *shape)
    assert x.min() >= 0 and x.max() <= 1


def test_conv_is_the_papers_network() -> None:
    vae = VAE(VAEConfig())
    kinds = [type(layer).__name__ for layer in vae.encoder_layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "PReLU"] * 3
    assert vae.feature_shape == (128, 4, 4)
    assert vae.mean.out_features == 16


def test_beta_vae_is_that_of_pytorch_vae_with_a_bounded_output() -> None:
    config = vae_config("beta_vae", (3, 64, 64))
    assert config.channels == (32, 64, 128, 256, 512) and config.latent_dim == 128
    vae = VAE(config)
    assert vae.feature_shape == (512, 2, 2)
    assert {type(layer).__name__ for layer in vae.encoder_layers} == {"Conv2d", "BatchNorm2d", "LeakyReLU"}
    # No tanh against images in [0, 1].
    assert "Tanh" not in {type(module).__name__ for module in vae.modules()}


def test_config_without_label_weight_is_described_as_in_older_models() -> None:
    assert "label_weight" not in VAEConfig().to_json()
    weighted = VAEConfig(label_weight=2.0)
    assert (
        weighted.to_json() == {**VAEConfig().to_json(), "label_weight": 2.0}
        and VAEConfig(**weighted.to_json()) == weighted
    )


def test_elbo_is_the_bound_term_by_term() -> None:
    vae = small_vae("conv", (1, 8, 12)).train(False)
    x, noise = torch.rand(3, 1, 8, 12), torch.randn(3, 5)
    config = VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7, 9), beta=2.5)
    parts = elbo(*vae(x, noise), x, config)
    mean, log_var = vae.encode(x)
    reconstruction = kl = 0.0
    p = vae.decode(mean + (log_var / 2).exp() * noise)
    for b in range(3):
        for pixel, q in zip(x[b].flatten().tolist(), p[b].flatten().tolist()):
            reconstruction -= (pixel * math.log(q) + (1 - pixel) * math.log(1 - q)) / 3
        for m, v in zip(mean[b].tolist(), log_var[b].tolist()):
            kl += 0.5 * (m * m + math.exp(v) - 1 - v) / 3
    assert parts["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(reconstruction + 2.5 * kl, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_smallest_at_the_image(loss: str) -> None:
    x = torch.tensor([0.2, 0.9])
    at_image = LOSSES[loss](torch.logit(x), x).sum()
    assert at_image < LOSSES[loss](torch.logit(x) + 0.1, x).sum()
    assert at_image < LOSSES[loss](torch.logit(x) - 0.1, x).sum()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "diffusion"}, "choose from beta_vae, conv"),
        ({"loss": "hinge"}, "choose from bce, mse, l1|choose from bce, l1, mse"),
        ({"image_shape": (28, 28)}, r"image_shape must be three positive numbers \(C, H, W\), got \(28, 28\)"),
        ({"channels": ()}, "channels must be one or more"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"beta": float("nan")}, "beta must be at least 0, got nan"),
    ],
)
def test_config_says_what_is_wrong(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**fields)
