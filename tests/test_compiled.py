"""Compiled networks agree with torch, give the same bits in each build with fused multiply-add, and are made once."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from networks import BUILD_NAMES, BUILDS, small_vae
from torch import nn

from clarity import compiled
from clarity.rows import decode_rows, encode_rows

COMPILED = [module for module in BUILDS if module is not None]
NETWORKS: dict[str, list[nn.Module]] = {
    "same": [nn.Conv2d(3, 5, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(5, 29, 3, padding=1, bias=False), nn.PReLU(29)],
    "halving": [
        nn.Conv2d(3, 7, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(7, 2, 3, padding=1),
    ],
    "down": [nn.Conv2d(3, 13, 3, stride=2, padding=1), nn.PReLU(), nn.Conv2d(13, 26, 3, stride=2, padding=1)],
    "up": [
        nn.ConvTranspose2d(3, 25, 3, stride=2, padding=1, output_padding=(1, 0)),
        nn.ReLU(),
        nn.ConvTranspose2d(25, 1, 3, stride=2, padding=1, output_padding=(0, 1)),
    ],
}


@pytest.mark.parametrize("module", COMPILED, ids=BUILD_NAMES[:-1])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 2), (5, 8), (9, 7)])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_layers_agree_with_torch(
    name: str, size: tuple[int, int], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "maps_module", lambda: module)
    apply = compiled.compiled(NETWORKS[name], (3, *size))
    assert apply is not None
    x = torch.randn(37, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(apply(x, len(x)), nn.Sequential(*NETWORKS[name])(x), atol=1e-5, rtol=1e-4)
    assert torch.equal(apply(x, 5)[:5], apply(x, 37)[:5]) and not apply(x, 5)[5:].any()
    assert apply(x[:0], 0).shape[0] == 0


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [nn.ReLU()],
        [nn.Conv2d(3, 4, 5, padding=2)],
        [nn.Conv2d(3, 4, 3)],
        [nn.Conv2d(3, 6, 3, padding=1, groups=3)],
        [nn.Conv2d(2, 4, 3, padding=1)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2, ceil_mode=True)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.ConvTranspose2d(3, 4, 3, padding=1)],
        [nn.Conv2d(3, 4, 3, padding=1).double()],
    ],
    ids=str,
)
def test_other_layers_are_left_to_torch(layers: list[nn.Module]) -> None:
    assert compiled.compiled(layers, (3, 8, 8)) is None


def test_builds_with_fused_multiply_add_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = torch.randn(40, 3, 9, 7), []
    for name, module in zip(BUILD_NAMES, BUILDS):
        if name.endswith(("avx512", "avx2")):
            monkeypatch.setattr(compiled, "maps_module", lambda module=module: module)
            applied = [compiled.compiled(layers, (3, 9, 7)) for layers in NETWORKS.values()]
            found.append(torch.cat([apply(x, 40).flatten() for apply in applied if apply is not None]))
    if len(found) < 2:
        pytest.skip("this processor runs one of them at most")
    assert torch.equal(*found), "nodes of both kinds work at one audit"


@pytest.mark.parametrize("module", COMPILED, ids=BUILD_NAMES[:-1])
def test_arrays_that_do_not_fit_are_refused(module: Any) -> None:
    layers, weights = (
        np.array([[0, 3, 4, 5, 1], [2, 2, 3, 6, 0]], np.int32),
        np.zeros(16 * 3 + 6 + 25 * 6 + 4, np.float32),
    )
    fits = [np.zeros((2, 1, 4, 5), np.float32), 1, 4, 5, layers, weights, np.zeros((2, 2, 3, 6), np.float32)]
    module.pack(*fits[1:6])
    module.apply(*fits)
    wrong = {0: fits[0][..., 1:].copy(), 2: 0, 3: 6, 4: layers + 1, 5: weights[1:], 6: fits[6][1:]}
    for index, value in wrong.items():
        with pytest.raises(ValueError, match="apply: the sizes of the arrays do not agree"):
            module.apply(*fits[:index], value, *fits[index + 1 :])
    with pytest.raises(ValueError, match="pack: the sizes of the arrays do not agree"):
        module.pack(1, 4, 5, layers, weights[1:].copy())


def test_what_is_made_of_a_network_follows_its_weights_and_does_not_keep_it() -> None:
    vae, x, z = small_vae("conv", (1, 8, 12)), torch.rand(3, 1, 8, 12), torch.randn(3, 5)
    before = encode_rows(vae, x)[0], decode_rows(vae, z)
    assert all(torch.equal(*pair) for pair in zip(before, (encode_rows(vae, x)[0], decode_rows(vae, z))))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.5)
    after = encode_rows(vae, x)[0], decode_rows(vae, z)
    torch.testing.assert_close(after, (vae.encode(x)[0].detach(), vae.decode(z).detach()), atol=1e-5, rtol=1e-4)
    assert not any(torch.equal(*pair) for pair in zip(before, after))
    freed = weakref.ref(vae)
    del vae, parameter
    gc.collect()
    assert freed() is None
