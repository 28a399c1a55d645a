"""Small networks with weights and BatchNorm moments that look trained, every axis of another size."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from clarity import native_search
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.images import Preprocessing
from clarity.model import Model, save_model
from clarity.vae import VAE, VAEConfig, vae_config

#: The builds of native/maps.cpp that run here, and None for PyTorch alone.
BUILD_NAMES = [name for build in native_search.modules() if find_spec(name := f"_clarity_maps_{build}")] + ["none"]
BUILDS = [*map(import_module, BUILD_NAMES[:-1]), None]


def small_vae(architecture: str, shape: tuple[int, int, int], latent_dim: int = 5) -> VAE:
    """A VAE in eval mode with BatchNorm moments of a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = VAE(vae_config(architecture, shape, latent_dim=latent_dim, channels=(6, 7, 9))).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return vae


def latent_ensemble(members: int = 2) -> LatentEnsemble:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LatentEnsemble(EnsembleConfig(4, latent_dim=5, hidden=(6, 7), num_members=members)).eval()


def image_ensemble(members: int = 2, architecture: str = "conv") -> ImageEnsemble:
    config = vae_config(architecture, (3, 8, 12), latent_dim=5, channels=(6, 7))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ensemble = ImageEnsemble(EnsembleConfig(4, latent_dim=5, hidden=(6,), num_members=members), config).eval()
        for name, buffer in ensemble.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return ensemble


def points(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((rows, 5) if kind == "latent" else (rows, 3, 8, 12), generator=generator)


ENSEMBLES = {"latent": latent_ensemble, "image": image_ensemble}


def tiny_model() -> Model:
    """A random but fixed Model: M=2 members, K=4 classes, D=5 latent, C=1, H=8, W=12."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = VAE(VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7))).eval()
        ensemble = LatentEnsemble(EnsembleConfig(num_classes=4, latent_dim=5, hidden=(6, 7), num_members=2)).eval()
    names = ("ant", "bee", "cow", "dog")
    return Model(vae, ensemble, names, Preprocessing(mode="L", height=8, width=12), fingerprint="tiny")


def save_digits_model(directory: Path) -> None:
    """The directory of a model for the shipped digits: random but fixed weights, M=3 members, D=5 latent."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        vae = VAE(VAEConfig(image_shape=(1, 28, 28), latent_dim=5, channels=(6, 7, 8))).eval()
        ensemble = LatentEnsemble(EnsembleConfig(num_classes=10, latent_dim=5, hidden=(6, 7), num_members=3)).eval()
    model = Model(vae, ensemble, tuple("0123456789"), Preprocessing(mode="L", height=28, width=28))
    save_model(model, directory, card={})
