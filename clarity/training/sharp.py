"""Training of a sharper decoder for the codes of a finished VAE, which stays as it is.

Its critic is trained along with it, its guide before it (``guide``); neither is kept or evaluates anything. Does not
know files.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from clarity.training.loops import (
    Epoch,
    Log,
    VAETraining,
    guide_loss,
    mixed_precision,
    run_epochs,
    seeded,
    weights_of,
)
from clarity.training.optimiser import generator_for, one_cycle
from clarity.vae import VAE, Decoder

#: From the weights of the VAE's own decoder, so that a few epochs do.
SHARP_TRAINING = VAETraining(epochs=4, min_updates=1200, batch_size=32, learning_rate=0.001)
#: Weights of the critic's features and of its verdict beside the mean absolute error of a pixel.
FEATURE_WEIGHT = 1.0
ADVERSARIAL_WEIGHT = 0.01
#: Of the guide's cross-entropy, in nats.
GUIDE_WEIGHT = 0.005


class Critic(nn.Module):
    """Tells patches of images from decoded ones (PatchGAN, Isola et al. 2017), with spectral normalisation."""

    def __init__(self, channels: int, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        steps = [nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairwise((channels, *widths))]
        self.steps = nn.ModuleList(spectral_norm(step) for step in steps)
        self.verdict = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The features of each step, and a verdict for each patch: positive for images."""
        features = []
        for step in self.steps:
            x = F.leaky_relu(step(x), 0.2)
            features.append(x)
        return features, self.verdict(x)


def train_sharp(
    images: Tensor,
    vae: VAE,
    training: VAETraining = SHARP_TRAINING,
    guide: nn.Module | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    log: Log = lambda line: None,
) -> Iterator[Epoch]:
    """Trains a decoder on codes drawn from the posteriors: L1, a critic's features, and its hinge loss.

    After Larsen et al. 2016 (features) and Lim and Ye 2017 (hinge). ``guide`` gives logits (B, F) of classes and
    attributes, which a picture is to have as its image has them. BatchNorm keeps the VAE's statistics, ``images`` are
    uint8 (N, C, H, W). Yields an Epoch each, with loss (L1 of a pixel, features, guide), l1, critic, and guide;
    ``weights_of`` takes the part "decoder" out of its checkpoint.
    """
    device = torch.device(device)
    images, vae = images.to(device), vae.to(device)
    guide = None if guide is None else guide.to(device)
    decoder = Decoder(vae.config)
    decoder.load_state_dict({name: value for name, value in vae.state_dict().items() if name.startswith("decoder_")})
    critic = seeded(lambda: Critic(vae.config.image_shape[0]), training.seed, "critic", 0)
    networks = nn.ModuleDict({"decoder": decoder, "critic": critic})
    if state is not None:
        networks.load_state_dict(weights_of(state))
    networks.to(device).to(memory_format=torch.channels_last)
    decoder.eval()
    drawing, judging = list(decoder.parameters()), list(critic.parameters())

    def updates_of(epoch: int, updates: int) -> Iterator[dict[str, Tensor]]:
        generator = generator_for(training.seed, "sharp", epoch)
        order = torch.randperm(len(images), generator=generator)
        for update in range(updates):
            batch = order[update * training.batch_size : (update + 1) * training.batch_size]
            noise = torch.randn((len(batch), vae.config.latent_dim), generator=generator)
            x = images[batch.to(device)].float().div_(255).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                mean, log_var = vae.encode(x)
            with mixed_precision(precision, device):
                drawn = decoder(mean + torch.exp(0.5 * log_var) * noise.to(device))
                (wanted, real), (found, fake) = critic(x), critic(drawn)
                guided = torch.zeros((), device=device) if guide is None else guide_loss(guide, drawn, x)
            # Means are taken in float32 even where the networks ran in bfloat16.
            real, fake, l1 = real.float(), fake.float(), (drawn.float() - x).abs().mean()
            features = sum((a.float() - b.detach().float()).abs().mean() for a, b in zip(found, wanted))
            loss = l1 + FEATURE_WEIGHT * features + GUIDE_WEIGHT * guided
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            gradients = torch.autograd.grad(loss - ADVERSARIAL_WEIGHT * fake.mean(), drawing, retain_graph=True)
            for parameter, gradient in zip(drawing, gradients):
                parameter.grad = gradient
            for parameter, gradient in zip(judging, torch.autograd.grad(hinge, judging)):
                parameter.grad = gradient
            yield {"loss": loss, "l1": l1, "critic": hinge, "guide": guided}

    yield from run_epochs(networks, training, len(images), one_cycle, state, updates_of, log)
