"""Fixtures that more than one test file uses: a tiny model whose axis sizes all differ, an S3 server, and one Ray."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports them: small thread pools, no telemetry, and no re-creation of workers through another tool.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import jobfiles
import pytest
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def load_job() -> Any:
    """Loads a program in jobs/ as a module, by its name."""
    return jobfiles.load_job


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Torch on one thread: networks this small lose time to a second one, and lose much of it on a busy machine."""
    from clarity.rows import one_thread

    with one_thread():
        yield


@pytest.fixture
def tiny_model() -> Any:
    """A random but fixed Model: M=2 members, K=4 classes, D=5 latent, C=1, H=8, W=12."""
    import networks

    return networks.tiny_model()


@pytest.fixture
def model(tiny_model: Any) -> Any:
    """The tiny model with a classifier of images, so that every method runs."""
    from dataclasses import replace

    import torch

    from clarity.classifiers import EnsembleConfig, ImageEnsemble

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = EnsembleConfig(num_classes=4, latent_dim=5, hidden=(6, 7), num_members=2)
        image_ensemble = ImageEnsemble(config, tiny_model.vae.config).eval()
        for weight in (*tiny_model.ensemble.weights, *image_ensemble.weights):  # so that images differ
            weight.data *= 3
    return replace(tiny_model, image_ensemble=image_ensemble)


@pytest.fixture(scope="session")
def tiny_digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model for the shipped digits: random but fixed weights, M=3 members, D=5 latent."""
    import networks

    directory = tmp_path_factory.mktemp("model") / "digits"
    networks.save_digits_model(directory)
    return directory


@pytest.fixture(scope="module")
def module_store() -> Iterator[Any]:
    """A real S3 server on loopback that has answered once."""
    from object_store import ObjectStore

    from clarity import storage

    with ObjectStore() as store:
        storage.exists(store.uri())
        yield store


@pytest.fixture
def store(module_store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server with nothing broken and an empty log; pauses between attempts are short."""
    from clarity import storage

    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    module_store.faults.clear()
    module_store.requests.clear()
    return module_store


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    """A real Ray of two CPUs in its own directory, started once for the whole session."""
    import shutil

    import ray

    # A short path: the sockets' names below it must stay under 107 characters.
    directory = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200_000_000,
        _temp_dir=directory,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
