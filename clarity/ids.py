"""Everything that is decided by an image id alone: split, fold, half of the held-out networks, sample, noise.

Each is a hash of the id under a prefix of its own, so independent of the others and of the order of the images.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def number_of(purpose: str, image_id: str) -> int:
    """A number of 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{image_id}".encode()).digest()[:8], "big")


def split_of(image_id: str) -> str:
    """The split of an image whose source has no splits: "test" for one id in ten, "train" for the others."""
    return "test" if number_of("split", image_id) % 10 == 0 else "train"


def fold_of(image_id: str, num_folds: int) -> int:
    """The cross-validation fold, 0 ... num_folds - 1, whose ensemble is trained without this image."""
    return number_of("fold", image_id) % num_folds


def in_judges_half(image_ids: Sequence[str]) -> np.ndarray:
    """Which training images the held-out evaluation networks are trained on: about half of them, (B,) bool."""
    return np.array([hashlib.sha256(f"judges/{name}".encode()).digest()[0] < 128 for name in image_ids], dtype=bool)


def sample(image_ids: Sequence[str], count: int) -> list[int]:
    """Indices of a fixed sample of at most ``count`` images, in their order; a larger sample contains a smaller one."""
    numbers = [number_of("sample", name) for name in image_ids]
    return sorted(sorted(range(len(numbers)), key=numbers.__getitem__)[:count])


def noise(image_ids: Sequence[str] | np.ndarray, dim: int) -> np.ndarray:
    """Standard normal noise (B, dim) float32; each row is a function of its image id (Box-Muller)."""
    pairs = (dim + 1) // 2
    stream = b"".join(hashlib.shake_256(f"noise:0:{name}".encode()).digest(16 * pairs) for name in image_ids)
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)) + 0.5) / 2.0**53
    first, second = uniform.reshape(len(image_ids), 2, pairs).transpose(1, 0, 2)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :dim].astype(np.float32)
