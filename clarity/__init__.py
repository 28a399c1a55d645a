"""Clarity: realistic counterfactual images for whole data sets, by search in the latent space of a VAE.

An audit of a data set runs through these files::

    images -> codes -> pairs -> search -> rows -> Parquet -> report
    data/     rows     explainer  search    schema  audit/    report/

Shapes, everywhere: B rows, N images of a set, P pairs (image, target); C, H, W image, D latent, K classes, M members,
A attributes, F features; T steps of a search or points of a curve, S slots of a block of the search. Images inside the
models are float32 (B, C, H, W) in [0, 1], in tables uint8 (C, H, W); ``logits`` are (M, B, K); uncertainties are in
nats.

The package never imports ray, never prints and does nothing at import. The programs in ``jobs/`` run it on a cluster.
"""

import importlib
from typing import Any

__version__ = "0.3.1"

#: The public names and their modules, which are imported on first use: readers of an audit do not load torch.
_MODULES = {
    "load": "clarity.model",
    "explain": "clarity.notebook",
    "decode": "clarity.notebook",
    "train": "clarity.training.local",
    "read_audit": "clarity.audit.read",
    "Explainer": "clarity.explainer",
    "SearchConfig": "clarity.search",
    "METHODS": "clarity.methods",
    "SOURCES": "clarity.data",
    "VAES": "clarity.vae",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'clarity' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), "load_model" if name == "load" else name)


def __dir__() -> list[str]:
    return __all__
