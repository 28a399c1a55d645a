"""Classifiers and rows for the tests of the compiled engines, and how far those may part from the plain one."""

import itertools
from typing import Any

import torch
from torch import Tensor

from clarity.objectives import LatentObjective, Layers
from clarity.search import SearchConfig, descend

CONFIG = SearchConfig(min_target_prob=0.6, max_steps=120)
SIZES = [
    (2, (5, 6, 7, 4)),
    (3, (5, 4)),  # no hidden layer
    (7, (16, 16, 16, 10)),
    (5, (33, 17, 9, 3, 29)),  # no multiple of a register tile anywhere
    (1, (2, 70, 2)),
]


def make_layers(members: int, sizes: tuple[int, ...], scale: float = 5.0, seed: int = 1) -> Layers:
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=noise) * 2 - 1) * sizes[0] ** -0.5

    return [
        (draw(members, i, o) * scale * (sizes[0] / i) ** 0.5, draw(members, o)) for i, o in itertools.pairwise(sizes)
    ]


def make_rows(layers: Layers, rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Codes and targets."""
    noise = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, layers[0][0].shape[1], generator=noise)
    return codes, torch.randint(0, layers[-1][0].shape[2], (rows,), generator=noise)


def arguments_of(layers: Layers, z: Tensor, target: Tensor, config: SearchConfig = CONFIG, **change: Any) -> Any:
    """What ``descend`` hands to a kernel for the same arguments, with z as the reference."""
    thresholds = torch.full((len(z),), config.min_target_prob, device=z.device)
    rows = {"target": target, "reference": z, "min_target_prob": thresholds}
    rows = {name: change.get(name, values) for name, values in rows.items()}
    objective = LatentObjective(layers, config.distance_weight, change.get("fixed"))
    return objective, z, rows, config.max_steps, config.learning_rate


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def take(found: dict[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
    return {name: values[index].contiguous() for name, values in found.items()}


def assert_agree_with_plain(
    searches: list[dict[str, Tensor]], layers: Layers, z: Tensor, target: Tensor, config: SearchConfig
) -> None:
    """The stated tolerance: steps equal for 99.5 % of the rows and off by one for the rest; of those with equal steps
    98 % end within 1e-4 (a coordinate that crosses the reference, or a unit that crosses 0, can part two roundings)."""
    rows = {"target": target, "reference": z}
    plain = descend(LatentObjective(layers, config.distance_weight), z, rows, config, engine="plain")
    assert plain.converged.float().mean() > 0.1
    assert len(plain.steps.unique()) > 5
    for found in searches:
        off = (found["steps"] - plain.steps).abs()
        assert (off == 0).float().mean() >= 0.995
        assert off.max() <= 1
        same = off == 0
        assert torch.equal((found["target_prob_final"] > config.min_target_prob)[same], plain.converged[same])
        assert ((found["point"] - plain.point).abs().amax(dim=1)[same] < 1e-4).float().mean() > 0.98
        assert torch.allclose(found["target_prob_initial"], plain.target_prob_initial, atol=1e-6)
        assert ((found["target_prob_final"] - plain.target_prob_final).abs()[same] < 1e-4).float().mean() > 0.98
        assert found["finite"].all()
