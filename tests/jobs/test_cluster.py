"""cluster.yaml against Ray's own schema, and the facts that its comments rest on. No cloud is asked."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobfiles import actors

FILE = Path(__file__).parent.parent.parent / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_cluster_passes_rays_own_validation(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

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


def test_page_says_what_the_plan_gives_to_gpu_nodes() -> None:
    page = (FILE.parent / "docs" / "clusters.md").read_text()
    rows = re.findall(
        r"^\| (\d) \| (\d+) \| (\d+) \| ([\d.]+), (\d) \| (\d+) \| (\d+) actors, (\d+) left \|$", page, re.M
    )
    assert {int(row[0]) for row in rows} == {1, 4, 8}
    for gpus, cpus, count, size, threads, left, halved, halved_left in rows:
        nodes = [{"CPU": float(cpus), "GPU": float(gpus)}]
        whole = actors.plan_resources(nodes, num_shards=1000)
        assert (whole.num_actors, whole.threads_per_actor) == (int(count), int(threads))
        assert whole.cpus_per_actor == float(size)
        assert float(cpus) - whole.num_actors * whole.cpus_per_actor == float(left)
        half = actors.plan_resources(nodes, num_shards=1000, gpus_per_actor=0.5)
        assert half.num_actors == int(halved)
        assert float(cpus) - half.num_actors * half.cpus_per_actor == float(halved_left)


# Field names of the custom resource RayJob, ray.io/v1, as the KubeRay operator defines them.
RAYJOB = {
    "spec": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions "
    "upgradeStrategy workerGroupSpecs",
    "autoscaler": "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
    "upscalingMode version volumeMounts",
    "auth": "enableK8sTokenAuth mode secretName",
    "head": "enableIngress headService ingressOptions labels rayStartParams resources serviceType template",
    "worker": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas "
    "resources scaleStrategy suspend template",
}


def test_rayjob_manifest_uses_the_custom_resources_field_names() -> None:
    page = (FILE.parent / "docs" / "clusters.md").read_text()
    manifest = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    cluster = manifest["spec"]["rayClusterSpec"]
    parts = {
        "spec": manifest["spec"],
        "cluster": cluster,
        "autoscaler": cluster["autoscalerOptions"],
        "auth": cluster["authOptions"],
        "head": cluster["headGroupSpec"],
        "worker": cluster["workerGroupSpecs"][0],
    }
    for part, found in parts.items():
        assert set(found) <= set(RAYJOB[part].split()), part
    worker = cluster["workerGroupSpecs"][0]
    assert worker["minReplicas"] == 0 and worker["maxReplicas"] > 0
    assert cluster["authOptions"]["mode"] == "token"
    # A container of a worker asks for its GPU, or nothing would ever scale one up.
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
