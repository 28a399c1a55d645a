"""Clarity: what would have to change in a picture for it to be seen as another class?

The way of the data::

    images -> shards -> latent codes -> search -> rows -> Parquet -> report
    data.py   audit.py   vae.py        search.py  schema.py         report.py

Shapes, everywhere: B rows, C, H, W image, D latent, K classes, M members. Images inside the models are float32
(B, C, H, W) in [0, 1], in the tables uint8 (C, H, W); ``logits`` are (M, B, K); uncertainties are in nats.

This package never imports ray, never prints and does nothing at import. The jobs in ``jobs/`` carry it over a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clarity.audit.read import read_audit as read_audit
    from clarity.data import SOURCES as SOURCES
    from clarity.explainer import Explainer as Explainer
    from clarity.methods import METHODS as METHODS
    from clarity.model import Model as Model
    from clarity.model import load_model as load
    from clarity.notebook import decode as decode
    from clarity.notebook import explain as explain
    from clarity.search import SearchConfig as SearchConfig
    from clarity.training.local import train as train

__version__ = "0.1.0"

# Loaded on first use, so that reading an audit's tables does not pay for importing torch.
_NAMES = {
    "METHODS": ("clarity.methods", "METHODS"),
    "SOURCES": ("clarity.data", "SOURCES"),
    "Explainer": ("clarity.explainer", "Explainer"),
    "Model": ("clarity.model", "Model"),
    "SearchConfig": ("clarity.search", "SearchConfig"),
    "decode": ("clarity.notebook", "decode"),
    "explain": ("clarity.notebook", "explain"),
    "load": ("clarity.model", "load_model"),
    "read_audit": ("clarity.audit.read", "read_audit"),
    "train": ("clarity.training.local", "train"),
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'clarity' has no attribute {name!r}; it offers {', '.join(__all__)}")
    import importlib

    module, attribute = _NAMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
