"""Batch-independent inference: the bits of a row do not depend on the other rows, its index, or the threads."""

from typing import Any

import pytest
import torch
from networks import BUILD_NAMES, BUILDS, ENSEMBLES, points, small_vae

from clarity import compiled
from clarity.rows import decode_rows, encode_rows, in_blocks, logits_rows, mean_probs, one_thread, uncertainties
from clarity.vae import VAES


@pytest.mark.parametrize("architecture", VAES)
@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 33, 18)])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("module", BUILDS, ids=BUILD_NAMES)
def test_rows_have_the_same_bits_in_any_batch(
    architecture: str, shape: tuple[int, int, int], threads: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "maps_module", lambda: module)
    vae = small_vae(architecture, shape)
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


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_logits_have_the_same_bits_in_any_batch(kind: str, threads: int) -> None:
    ensemble, rows = ENSEMBLES[kind](3), points(kind, 200)
    with one_thread():
        expected = logits_rows(ensemble, rows)
    torch.testing.assert_close(expected, ensemble(rows).detach(), atol=1e-5, rtol=1e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index in (torch.randperm(200), torch.tensor([131]), torch.arange(3, 140)):
            assert torch.equal(logits_rows(ensemble, rows[index]), expected[:, index])
    finally:
        torch.set_num_threads(before)


def test_predictions_have_the_same_bits_in_any_batch() -> None:
    logits = torch.randn(3, 300, 7, generator=torch.Generator().manual_seed(0)) * 20
    whole = mean_probs(logits), *uncertainties(logits)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 270), slice(299, 300)):
        for some, every in zip((mean_probs(logits[:, rows]), *uncertainties(logits[:, rows])), whole):
            assert (some == every[rows]).all()


@pytest.mark.parametrize("architecture", VAES)
@pytest.mark.parametrize("module", BUILDS, ids=BUILD_NAMES)
def test_rows_agree_with_the_network(architecture: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "maps_module", lambda: module)
    vae = small_vae(architecture, (3, 33, 18))
    x, z = torch.rand(7, 3, 33, 18), torch.randn(7, 5)
    with torch.no_grad():
        for ours, theirs in zip((*encode_rows(vae, x), decode_rows(vae, z)), (*vae.encode(x), vae.decode(z))):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_change_neither_the_network_nor_the_number_of_threads() -> None:
    vae = small_vae("conv", (1, 8, 12))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    threads = torch.get_num_threads()
    encode_rows(vae, torch.rand(300, 1, 8, 12))
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_rows_may_be_none() -> None:
    vae = small_vae("conv", (1, 8, 12))
    assert encode_rows(vae, torch.rand(0, 1, 8, 12))[0].shape == (0, 5)
    assert decode_rows(vae, torch.rand(0, 5)).shape == (0, 1, 8, 12)


def test_rows_reject_training_mode_and_wrong_shapes() -> None:
    vae = small_vae("conv", (1, 8, 12))
    with pytest.raises(ValueError, match=r"expected float rows of shape \('B', 1, 8, 12\), got \(2, 1, 12, 8\)"):
        encode_rows(vae, torch.rand(2, 1, 12, 8))
    with pytest.raises(ValueError, match="expected float rows"):
        encode_rows(vae, torch.zeros((2, 1, 8, 12), dtype=torch.uint8))
    with pytest.raises(ValueError, match="training mode"):
        decode_rows(vae.train(), torch.rand(2, 5))


def test_blocks_on_a_device_convolve_in_float32_by_repeatable_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)  # as a caller may have it

    def flags() -> tuple[Any, ...]:
        return cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark

    def function(block: torch.Tensor, _: int) -> torch.Tensor:
        seen.append(flags())
        return block

    before = flags()
    assert in_blocks(function, torch.rand((1030, 3), device="meta")).shape == (1030, 3)
    assert seen == [("ieee", True, False)] * 2 and flags() == before != seen[0]


def test_one_thread_yields_the_number_outside_of_all_blocks() -> None:
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
