"""cluster.yaml against Ray's own schema, and the facts that its comments rest on. No cloud is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_cluster_passes_rays_own_validation(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_cluster_validation_sees_a_misspelt_key(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(cluster))


def test_cluster_scales_from_zero_gpu_workers(cluster: dict[str, Any]) -> None:
    gpu = cluster["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert gpu["resources"] == {"CPU": 8, "GPU": 1}
    assert gpu["max_workers"] == cluster["max_workers"]
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_cluster_runs_the_ray_that_the_package_asks_for(cluster: dict[str, Any]) -> None:
    pin = next(line for line in (FILE.parent / "pyproject.toml").read_text().splitlines() if "ray[data" in line)
    assert pin.split("==")[1].startswith("2.60")
    assert "ray:2.60." in cluster["docker"]["image"]


def test_cluster_never_switches_authentication_off(cluster: dict[str, Any]) -> None:
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert any(target.endswith("auth_token") for target in cluster["file_mounts"])
