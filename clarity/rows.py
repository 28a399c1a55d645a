"""Batch-independent inference: a row's result does not depend on its batch.

Libraries choose kernels by shape and by number of threads, so that the same row computed in two batches differs in its
last bits. Here networks run on blocks of one fixed size, on one thread each: on a CPU a row's bits depend neither on
the other rows, nor on its index, nor on the numbers of rows and threads. Does not know where rows come from.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clarity.classifiers import LEAST_OUTPUTS, ImageEnsemble, LatentEnsemble
from clarity.compiled import Maps, compiled, kept
from clarity.uncertainty import Uncertainty, decompose
from clarity.vae import VAE, Decoder

#: Rows of a block by device: the fastest of 16 ... 512 for 28x28 images on a CPU. Part of the arithmetic: never tuned.
ROW_BLOCK = {"cpu": 128, "cuda": 1024}

#: Number of threads that torch has outside of ``one_thread``; set inside of it.
_THREADS: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def one_thread(threads: int | None = None) -> Iterator[int]:
    """Run torch on one thread inside the block; yields the number of threads set outside of all such blocks.

    ``threads`` is yielded instead where it is given, by this block and by those inside it.

    Libraries split long sums by the number of threads, so only a fixed number gives the same bits everywhere. Their
    threads also spin while they wait for the next small operation, on cores that others could use.
    """
    before = torch.get_num_threads()
    outside = threads or _THREADS.get() or before
    token = _THREADS.set(outside)
    torch.set_num_threads(1)
    try:
        yield outside
    finally:
        torch.set_num_threads(before)
        _THREADS.reset(token)


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """On a GPU convolve in float32 inside the block, as products do, by algorithms that give the same bits each time.

    By default cuDNN rounds what it multiplies to 10 bits (TF32): codes then move by 0.004 and a judge's probabilities
    by 0.04, and a picture decoded on a CPU is another.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = "ieee", True, False
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


def in_blocks(function: Maps, rows: Tensor, dim: int = 0, at_once: int | None = None) -> Tensor:
    """Apply a function to rows in blocks of one fixed size, the last one padded with zeros, without gradients.

    On a CPU each block is computed on one thread, several blocks at a time. The library then always picks the same
    kernel, within which no row's arithmetic depends on its index: the tests check this bit by bit for every layer used.

    Args:
        function: maps a block, with the number of its rows before the zeros, to a tensor with the rows in axis ``dim``.
        rows: (B, ...).
        dim: axis of the rows in the output.
        at_once: blocks computed at a time on a CPU; torch's number of threads by default.
    """
    size = ROW_BLOCK.get(rows.device.type, 1024)

    def compute(start: int) -> Tensor:
        part = rows[start : start + size]
        with torch.inference_mode():
            # A new buffer for each block: kernels are chosen by memory alignment, too.
            block = rows.new_zeros((size, *rows.shape[1:]))
            block[: len(part)] = part
            return function(block, len(part)).narrow(dim, 0, len(part))

    starts = range(0, max(len(rows), 1), size)
    if rows.device.type != "cpu":
        with float32_convolutions():
            return torch.cat([compute(start) for start in starts], dim)
    with one_thread() as threads:
        at_once = min(at_once or threads, len(starts))
        if at_once == 1:
            outputs = [compute(start) for start in starts]
        else:
            with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                outputs = list(pool.map(compute, starts))
    return torch.cat(outputs, dim)


def folded(layers: nn.Sequential) -> nn.Sequential:
    """The same map in eval mode with each BatchNorm folded into the convolution before it."""
    folded: list[nn.Module] = []
    for layer in layers:
        previous = folded[-1] if folded else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d | nn.ConvTranspose2d):
            folded[-1] = fuse_conv_bn_eval(
                previous.eval(), layer.eval(), transpose=isinstance(previous, nn.ConvTranspose2d)
            )
        else:
            folded.append(layer)
    return nn.Sequential(*folded)


def require_eval(module: nn.Module) -> None:
    """Raise ValueError when a network is in training mode."""
    if module.training:
        raise ValueError("the network is in training mode, in which rows depend on each other; call .eval() on it")


def require_rows(rows: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless rows are floats of shape (B, *shape)."""
    if tuple(rows.shape[1:]) != shape or not rows.is_floating_point():
        raise ValueError(f"expected float rows of shape {('B', *shape)}, got {tuple(rows.shape)} of {rows.dtype}")


@torch.inference_mode()
def encode_rows(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance (B, D) of images (B, C, H, W)."""
    require_eval(vae)
    require_rows(x, vae.config.image_shape)
    mean, log_var = in_blocks(kept(vae, "encode", lambda: encoder_of(vae)), x).chunk(2, 1)
    return mean.contiguous(), log_var.contiguous()


def encoder_of(vae: VAE) -> Maps:
    """Means and log-variances side by side (B, 2 D) of blocks of images."""
    maps = compiled_or_not(list(folded(vae.encoder_layers)), vae.config.image_shape)
    weight = torch.cat([vae.mean.weight, vae.log_var.weight])
    bias = torch.cat([vae.mean.bias, vae.log_var.bias])
    outputs = len(bias)
    if outputs < LEAST_OUTPUTS:
        weight, bias = (torch.cat([each, each.new_zeros(LEAST_OUTPUTS, *each.shape[1:])]) for each in (weight, bias))
    return lambda block, count: F.linear(maps(block, count).flatten(1), weight, bias)[:, :outputs]


@torch.inference_mode()
def decode_rows(decoder: VAE | Decoder, z: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of codes (B, D)."""
    require_eval(decoder)
    require_rows(z, (decoder.config.latent_dim,))
    return in_blocks(kept(decoder, "decode", lambda: decoder_of(decoder)), z)


def decoder_of(decoder: VAE | Decoder) -> Maps:
    """Images of blocks of codes."""
    layers, shape = list(folded(decoder.decoder_layers)), decoder.feature_shape
    first = nn.Sequential(*itertools.takewhile(lambda layer: isinstance(layer, nn.PReLU | nn.LeakyReLU), layers))
    maps, enter = compiled_or_not(layers[len(first) :], shape), decoder.decoder_input
    return lambda block, count: torch.sigmoid(maps(first(enter(block).unflatten(1, shape)), count))


def compiled_or_not(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> Maps:
    """The layers as a function of images (B, *shape): in compiled code where that is possible, else in PyTorch."""
    network = nn.Sequential(*layers)
    in_torch: Maps = lambda x, _: network(x.contiguous(memory_format=torch.channels_last)).contiguous()  # noqa: E731
    return compiled(layers, shape) or in_torch


@torch.inference_mode()
def logits_rows(ensemble: LatentEnsemble | ImageEnsemble, points: Tensor) -> Tensor:
    """Logits (M, B, K) of codes (B, D) or images (B, C, H, W)."""
    require_eval(ensemble)
    # A block of small perceptrons is computed before a second thread has started.
    at_once = 1 if isinstance(ensemble, LatentEnsemble) else None
    return in_blocks(lambda block, _: ensemble(block), points, dim=1, at_once=at_once)


def mean_probs(logits: Tensor) -> np.ndarray:
    """Mean probabilities (B, K) of logits (M, B, K)."""
    return in_blocks(lambda block, _: block.softmax(-1).mean(1), logits.transpose(0, 1)).cpu().numpy()


def uncertainties(logits: Tensor) -> Uncertainty[np.ndarray]:
    """Uncertainties of logits (M, B, K), as arrays."""
    values = in_blocks(lambda block, _: torch.stack(decompose(block.transpose(0, 1)), 1), logits.transpose(0, 1))
    return Uncertainty(*np.ascontiguousarray(values.cpu().numpy().T))
