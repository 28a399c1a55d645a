"""The VAE: shapes from the image alone, the bound, and rows that do not know each other."""

from __future__ import annotations

import math

import pytest
import torch

from clarity.vae import (
    LOSSES,
    VAE,
    VAES,
    VAEConfig,
    build_vae,
    decode_rows,
    elbo,
    encode_rows,
    in_blocks,
    one_thread,
    vae_config,
)

SHAPES = [(1, 28, 28), (1, 8, 12), (3, 33, 18), (3, 64, 64)]


def small(architecture: str, shape: tuple[int, int, int], latent_dim: int = 5) -> VAE:
    """A VAE in eval mode with BatchNorm moments of a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = build_vae(vae_config(architecture, shape, latent_dim=latent_dim, channels=(6, 7, 9))).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return vae


@pytest.mark.parametrize("architecture", VAES)
@pytest.mark.parametrize("shape", SHAPES)
def test_vae_shapes_follow_from_the_image(architecture: str, shape: tuple[int, int, int]) -> None:
    vae = small(architecture, shape)
    mean, log_var = vae.encode(torch.rand(4, *shape))
    assert mean.shape == log_var.shape == (4, 5)
    x = vae.decode(mean)
    assert x.shape == (4, *shape)
    assert x.min() >= 0 and x.max() <= 1


def test_conv_is_the_papers_network() -> None:
    vae = build_vae(VAEConfig())
    kinds = [type(layer).__name__ for layer in vae.encoder_layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "PReLU"] * 3
    assert vae.feature_shape == (128, 4, 4)
    assert vae.mean.out_features == 16


def test_beta_vae_is_that_of_pytorch_vae_with_a_bounded_output() -> None:
    config = vae_config("beta_vae", (3, 64, 64))
    assert config.channels == (32, 64, 128, 256, 512) and config.latent_dim == 128
    vae = build_vae(config)
    assert vae.feature_shape == (512, 2, 2)
    assert {type(layer).__name__ for layer in vae.encoder_layers} == {"Conv2d", "BatchNorm2d", "LeakyReLU"}
    # No tanh against images in [0, 1].
    assert "Tanh" not in {type(module).__name__ for module in vae.modules()}


def test_elbo_is_the_bound_term_by_term() -> None:
    vae = small("conv", (1, 8, 12)).train(False)
    x, noise = torch.rand(3, 1, 8, 12), torch.randn(3, 5)
    config = VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7, 9), beta=2.5)
    parts = elbo(vae, x, noise, config)
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


@pytest.mark.parametrize("architecture", VAES)
@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 33, 18)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_have_the_same_bits_wherever_they_stand(
    architecture: str, shape: tuple[int, int, int], threads: int
) -> None:
    vae = small(architecture, shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(200, *shape, generator=generator)
    z = torch.randn(200, 5, generator=generator)
    order = torch.randperm(200, generator=generator)
    with one_thread():
        means, log_vars, images = *encode_rows(vae, x), decode_rows(vae, z)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (order, torch.arange(200), torch.tensor([131]), torch.arange(3, 140), torch.arange(199, -1, -7)):
            mean, log_var = encode_rows(vae, x[rows])
            assert torch.equal(mean, means[rows])
            assert torch.equal(log_var, log_vars[rows])
            assert torch.equal(decode_rows(vae, z[rows]), images[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", VAES)
def test_rows_agree_with_the_network(architecture: str) -> None:
    vae = small(architecture, (3, 33, 18))
    x, z = torch.rand(7, 3, 33, 18), torch.randn(7, 5)
    with torch.no_grad():
        for ours, theirs in zip((*encode_rows(vae, x), decode_rows(vae, z)), (*vae.encode(x), vae.decode(z))):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_leave_the_network_and_the_threads_alone() -> None:
    vae = small("conv", (1, 8, 12))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    threads = torch.get_num_threads()
    encode_rows(vae, torch.rand(300, 1, 8, 12))
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_rows_of_none_are_none() -> None:
    vae = small("conv", (1, 8, 12))
    assert encode_rows(vae, torch.rand(0, 1, 8, 12))[0].shape == (0, 5)
    assert decode_rows(vae, torch.rand(0, 5)).shape == (0, 1, 8, 12)


def test_rows_refuse_training_mode_and_wrong_shapes() -> None:
    vae = small("conv", (1, 8, 12))
    with pytest.raises(ValueError, match=r"expected float rows of shape \('B', 1, 8, 12\), got \(2, 1, 12, 8\)"):
        encode_rows(vae, torch.rand(2, 1, 12, 8))
    with pytest.raises(ValueError, match="expected float rows"):
        encode_rows(vae, torch.zeros((2, 1, 8, 12), dtype=torch.uint8))
    with pytest.raises(ValueError, match="training mode"):
        decode_rows(vae.train(), torch.rand(2, 5))


def test_in_blocks_keeps_rows_on_any_axis() -> None:
    rows = torch.randn(300, 2)
    stacked = in_blocks(lambda block: torch.stack([block, 2 * block]), rows, dim=1)
    assert torch.equal(stacked, torch.stack([rows, 2 * rows]))


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


def test_one_thread_tells_the_number_outside_of_all_blocks() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread() as outer, one_thread() as inner:
            assert (outer, inner, torch.get_num_threads()) == (3, 3, 1)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(2)
        with one_thread() as again:
            assert again == 2
    finally:
        torch.set_num_threads(before)
