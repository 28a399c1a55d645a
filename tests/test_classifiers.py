"""Ensembles: stacked members compute what each computes alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ENSEMBLES, image_ensemble, latent_ensemble, points
from torch import nn

from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble, stack_members
from clarity.vae import VAE, VAES, VAEConfig


def test_latent_member_is_a_perceptron() -> None:
    ensemble, z = latent_ensemble(), points("latent", 3)
    logits = ensemble(z)
    assert logits.shape == (2, 3, 4)
    for m in range(2):
        h = z
        for i, (weight, bias) in enumerate(ensemble.layers()):
            h = (h.relu() if i else h) @ weight[m] + bias[m]
        torch.testing.assert_close(logits[m], h)


def test_image_member_is_the_encoder_then_the_perceptron() -> None:
    """The same map from plain modules: convolutions, BatchNorm, PReLU, the mean's head, the perceptron."""
    ensemble, x = image_ensemble(), points("image", 3)
    state = ensemble.state_dict()
    for m in range(2):
        h = x
        for i, layer in enumerate(ensemble.encoder_layers):
            own = {k: v.unflatten(0, (2, -1))[m] for k, v in layer.state_dict().items() if v.ndim}
            if isinstance(layer, nn.Conv2d):
                h = F.conv2d(h, own["weight"], own["bias"], stride=2, padding=1)
            elif isinstance(layer, nn.BatchNorm2d):
                h = F.batch_norm(h, own["running_mean"], own["running_var"], own["weight"], own["bias"])
            else:
                assert isinstance(layer, nn.PReLU), i
                h = F.prelu(h, own["weight"])
        h = F.linear(h.flatten(1), state["mean_weight"][m], state["mean_bias"][m])
        h = h @ state["weights.0"][m] + state["biases.0"][m]
        h = h.relu() @ state["weights.1"][m] + state["biases.1"][m]
        torch.testing.assert_close(ensemble(x)[m], h, atol=1e-5, rtol=1e-4)


def test_image_and_latent_classifier_have_equal_parameter_counts() -> None:
    config = VAEConfig()
    vae = VAE(config)
    of_image = ImageEnsemble(EnsembleConfig(10, num_members=1), config)
    of_latent = LatentEnsemble(EnsembleConfig(10, num_members=1))
    on_the_way = [*vae.encoder_layers.parameters(), *vae.mean.parameters(), *of_latent.parameters()]
    assert sum(p.numel() for p in of_image.parameters()) == sum(p.numel() for p in on_the_way)


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_rows_for_each_member_agree_with_rows_for_all(kind: str) -> None:
    ensemble, rows = ENSEMBLES[kind](), points(kind, 3)
    torch.testing.assert_close(ensemble(rows), ensemble(torch.stack([rows, rows])))
    other = torch.stack([rows, rows + 1])
    torch.testing.assert_close(ensemble(other)[1], ensemble(rows + 1)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_select_and_stack_are_inverse(kind: str) -> None:
    ensemble, rows = ENSEMBLES[kind](3), points(kind, 3)
    alone = [ensemble.member(m) for m in range(3)]
    assert all(member.config.num_members == 1 and not member.training for member in alone)
    torch.testing.assert_close(torch.cat([member(rows) for member in alone]), ensemble(rows), atol=1e-5, rtol=1e-4)
    again = stack_members(alone).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ensemble.state_dict().items())
    torch.testing.assert_close(ensemble.select([2, 0])(rows), ensemble(rows)[[2, 0]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", VAES)
def test_image_ensemble_exists_for_each_architecture(architecture: str) -> None:
    assert image_ensemble(2, architecture)(points("image", 3)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "at least 2 classes, got 1"),
        ({"num_classes": 3, "hidden": (0,)}, "at least 1"),
        ({"num_classes": 3, "num_members": 0}, "at least 1"),
    ],
)
def test_config_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleConfig(**fields)


def test_image_ensemble_rejects_another_latent_dim() -> None:
    with pytest.raises(ValueError, match="latent_dim of the ensemble is 16, of the encoder 5"):
        ImageEnsemble(EnsembleConfig(4), VAEConfig(latent_dim=5))
