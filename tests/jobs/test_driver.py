"""The resource plan: what it gives on known machines, and the rule that no placement takes a node's last CPU."""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobfiles import actors, driver, load_job
from ray.exceptions import RaySystemError


def node(cpus: float, gpus: float = 0, memory: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": memory}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        # cores, GPUs -> actors, CPUs and threads of each
        ([node(2)], (2, 0.5, 0.0, 1)),
        ([node(1)], (1, 0.5, 0.0, 1)),
        ([node(4)], (4, 0.75, 0.0, 1)),
        ([node(16)], (8, 1.75, 0.0, 2)),
        ([node(2), node(2)], (4, 0.31, 0.0, 1)),
        ([node(0), node(2), node(2)], (4, 0.31, 0.0, 1)),
        ([node(8, 1)], (1, 1.0, 1.0, 8)),
        ([node(4), node(32, 8)], (8, 1.0, 1.0, 4)),
        ([node(4, 8)], (8, 0.37, 1.0, 1)),
    ],
)
def test_plan_resources_knows_common_machines(
    nodes: list[dict[str, float]], expected: tuple[int, float, float, int]
) -> None:
    found = actors.plan_resources(nodes, num_shards=1000)
    assert (found.num_actors, found.cpus_per_actor, found.gpus_per_actor, found.threads_per_actor) == expected


def test_a_misspelt_flag_is_answered_by_the_flag_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    parser = driver.new_parser("A job.")
    driver.add_data_flags(parser, "train", "Split")
    for argv, said in (
        (["--datasett", "folder"], "unrecognized arguments: --datasett folder; did you mean --dataset?"),
        (["--qqq"], "unrecognized arguments: --qqq (--help"),
        (["--dataset", "folders"], "argument --dataset: invalid choice: 'folders' (choose from"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(argv)
        text = capsys.readouterr().err
        assert said in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("name", ["train", "explain_all"])
def test_help_names_the_splits(name: str) -> None:
    (split,) = (flag for flag in load_job(name).new_parser()._actions if flag.dest == "split")
    assert "train, validation, test" in split.help


def test_plan_resources_uses_a_cluster_of_hundreds() -> None:
    found = actors.plan_resources([node(0)] + [node(16)] * 300, num_shards=20_000)
    assert (found.num_actors, found.cpus_per_actor) == (1800, 2.33)
    found = actors.plan_resources([node(4)] + [node(64, 8)] * 200, num_shards=20_000)
    assert (found.num_actors, found.gpus_per_actor) == (1600, 1)


def test_plan_resources_is_at_once_done_with_a_mixed_cluster() -> None:
    """Trying one number of actors after another took minutes here."""
    start = time.process_time()
    found = actors.plan_resources([node(16)] * 300 + [node(32)] * 100 + [node(96)] * 50, num_shards=20_000)
    assert (found.num_actors, found.cpus_per_actor) == (800, 14.0)
    assert time.process_time() - start < 5


def test_nodes_to_come_are_those_of_the_clusters_description() -> None:
    description = actors.autoscaler_description(Path(__file__).parent.parent.parent / "cluster.yaml")
    assert description is not None
    most, head = description["max_workers"], node(0)
    assert actors.nodes_to_come([head], description) == [head] + [{"CPU": 8.0, "GPU": 1.0}] * most
    planned = actors.plan_resources(actors.nodes_to_come([head], description), 1000)
    assert (planned.num_actors, planned.gpus_per_actor) == (most, 1)
    # Those that are there already are not counted twice, and others leave less room.
    assert len(actors.nodes_to_come([head, node(8, 1), node(8, 1)], description)) == 1 + most
    assert len(actors.nodes_to_come([head, node(16), node(8, 1)], description)) == 1 + most
    assert actors.nodes_to_come(
        [head], {"max_workers": 3, "available_node_types": {"gpu": {"resources": {"GPU": 1}}}}
    ) == [head]


def test_nodes_to_come_follow_the_largest_where_only_their_number_is_known() -> None:
    assert actors.nodes_to_come([node(0), node(8), node(4, 1)], None, 3) == [node(0), node(8), node(4, 1), node(4, 1)]
    assert actors.nodes_to_come([node(0), node(8), node(8)], None, 1) == [node(0), node(8), node(8)]
    assert actors.nodes_to_come([node(0)], None, 4) == [node(0)]
    assert actors.nodes_to_come([node(2)], None) == [node(2)]
    with pytest.raises(ValueError, match="max_nodes: expected at least 1, got 0"):
        actors.nodes_to_come([node(2)], None, 0)


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "a: [", "\x00"])
def test_autoscaler_description_is_none_where_there_is_none(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    if text is not None:
        file.write_text(text)
    assert actors.autoscaler_description(file) is None


def test_plan_resources_gives_no_more_actors_than_shards_or_memory() -> None:
    assert actors.plan_resources([node(64)], num_shards=3).num_actors == 3
    assert actors.plan_resources([node(64, memory=5e9)], num_shards=100).num_actors == 5


cluster = st.lists(st.integers(1, 96), min_size=1, max_size=8)


@given(cluster, st.integers(1, 500))
def test_plan_resources_never_lets_a_placement_take_the_last_cpu(cpus: list[int], num_shards: int) -> None:
    found = actors.plan_resources([node(c) for c in cpus], num_shards=num_shards)
    size = found.cpus_per_actor
    for c in cpus:
        most = min(found.num_actors, int(c / size + 1e-9))  # all that Ray could put there
        assert c - most * size >= (1 if c > 2 else 0.5) - 1e-9
        assert c - most * size >= found.io_cpus
    # All have a place now, and when the largest node is lost an actor still has one, single CPUs apart.
    large = sorted(c for c in cpus if c > 1)
    assert len(large) < 2 or large[-2] >= size
    assert sum(int(c / size + 1e-9) for c in cpus) >= found.num_actors


@given(st.lists(st.tuples(st.integers(1, 96), st.integers(0, 8)), min_size=1, max_size=6))
def test_plan_resources_leaves_gpu_nodes_a_cpu(shapes: list[tuple[int, int]]) -> None:
    try:
        found = actors.plan_resources([node(c, g) for c, g in shapes], num_shards=1000)
    except ValueError as error:
        assert "CPU" in str(error)
        return
    if found.gpus_per_actor:
        for c, g in shapes:
            assert c - min(g, found.num_actors) * found.cpus_per_actor >= min(1, c / 2) - 1e-9


@pytest.mark.parametrize(
    ("nodes", "asked", "remedy"),
    [
        ([node(0)], {}, "--num-cpus"),
        ([node(2)], {"actors": 64}, "--actors 4 or fewer"),
        ([node(2)], {"gpus_per_actor": 1}, "--gpus-per-actor 0"),
        ([node(16, 4)], {"actors": 5}, "--actors 4"),
        ([node(16, 4)], {"gpus_per_actor": 1.5}, "whole number"),
        ([node(16)], {"actors": 0}, "at least 1"),
        ([node(1, 16)], {}, "more CPUs"),
    ],
)
def test_plan_resources_refuses_what_cannot_be_scheduled(
    nodes: list[dict[str, float]], asked: dict[str, float], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        actors.plan_resources(nodes, num_shards=100, **asked)  # type: ignore[arg-type]


def test_plan_resources_shares_a_gpu() -> None:
    assert actors.plan_resources([node(8, 1)], num_shards=9, gpus_per_actor=0.25).num_actors == 4
    assert actors.plan_resources([node(8, 1)], num_shards=9, gpus_per_actor=0, actors=2).gpus_per_actor == 0


def test_resources_describe_themselves() -> None:
    described = actors.Resources(2, 0.5, 0.0, 2, 0.5, 2).describe()
    assert described == "2 actors on 2 nodes, each 0.5 CPU, 2 threads"


def test_actors_of_one_core_read_and_write_where_nobody_waits() -> None:
    small, large, gpu = (actors.plan_resources([each], num_shards=9) for each in (node(2), node(16), node(8, 1)))
    assert [each.actors_write("/audits/digits") for each in (small, large, gpu)] == [True, False, False]
    assert not small.actors_write("s3://bucket/audit")


def test_progress_advises_by_the_shard_that_reaches_least(capsys: pytest.CaptureFixture[str]) -> None:
    notes = [
        {"pairs": 10, "converged": 4, "reach": 0.7},
        {"error": "lost"},
        {"pairs": 9, "converged": 9, "reach": 0.99},
    ]
    assert len(list(driver.progress(enumerate(notes), 3))) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[-2] == "3 of 3 shards, 19 pairs, 1 failed"
    assert told[-1] == (
        "6 (31.58 %) of the searches did not converge; 95 % of the pairs reach 0.700: "
        "try --min-target-prob auto, or 0.69"
    )
    assert len(list(driver.progress(enumerate(notes), 3, by_class=True))) == 3
    assert capsys.readouterr().out.endswith("reach 0.700: try --min-target-prob 0.69\n")


def test_job_path_keeps_away_from_a_temporary_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert driver.job_path(None, "runs/digits/model", "--model") == str(tmp_path / "runs/digits/model")
    assert driver.job_path("model", "", "--model") == str(tmp_path / "model")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert driver.job_path(None, "runs/digits/model", "--model") == "/home/somebody/runs/digits/model"
    assert driver.job_path("/data/model", "", "--model") == "/data/model"
    assert driver.job_path("s3://bucket/model", "", "--model") == "s3://bucket/model"
    with pytest.raises(ValueError, match=r"--out audit: .* give an absolute path"):
        driver.job_path("audit", "", "--out")


def test_ray_that_does_not_answer_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "RAY_CONTACT_S", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        driver.require_answer(f"127.0.0.1:{port}")
        driver.require_answer(f"ray://127.0.0.1:{port}")
    for address in ("", "auto", "local"):
        driver.require_answer(address)
    with pytest.raises(ValueError, match=f"RAY_ADDRESS: expected a Ray at 127.0.0.1:{port}, got no answer in 1 s"):
        driver.require_answer(f"127.0.0.1:{port}")
    assert "trying again" in capsys.readouterr().err
    (tmp_path / "ray").mkdir()
    (file := tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"^{file}: expected a Ray at 127.*, or remove {file} for a Ray of this job's"):
        driver.start_ray()


def test_ray_that_a_job_joins_is_not_said_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("enough is seen")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver, "WORKER_ENVIRONMENT", {})
    monkeypatch.setattr(driver, "interruptible", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RaySystemError, match="enough is seen"):
        driver.start_ray()
    assert "starting Ray" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(RaySystemError, match="enough is seen"):
            driver.start_ray()
    assert "starting Ray" not in capsys.readouterr().out


def test_silent_core_hears_nothing_and_gives_stderr_back(capfd: pytest.CaptureFixture[str]) -> None:
    with driver.silent_core():
        os.write(2, b"logging.cc: a level was set\n")
    os.write(2, b"error: ours\n")
    assert capfd.readouterr().err == "error: ours\n"


@pytest.mark.slow
def test_workers_of_a_ray_started_here_wait_passively_at_no_niceness_and_it_can_be_started_again() -> None:
    program = """
import os
import driver, ray
driver.start_ray()
print(*ray.get(ray.remote(lambda: [os.environ["OMP_WAIT_POLICY"], os.nice(0)]).remote()))
driver.end_ray()
driver.start_ray()
print(ray.is_initialized() and ray.get(ray.remote(lambda: "again").remote()))
"""
    env = {name: value for name, value in os.environ.items() if name not in driver.WORKER_ENVIRONMENT}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        env |= {"RAY_TMPDIR": short, "PYTHONPATH": str(Path(driver.__file__).parent), "RAY_ADDRESS": "local"}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert run.stdout.splitlines() == ["starting Ray", "passive 0", "starting Ray", "again"], run.stderr


def test_job_without_a_useful_actor_needs_no_ray_unless_somebody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start() -> None:
        raise Started

    monkeypatch.setattr(driver, "start_ray", start)
    monkeypatch.setattr(driver, "has_gpus", lambda args: False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nothing = argparse.Namespace(actors=None, gpus_per_actor=None, max_nodes=None)
    assert driver.plan_actors(nothing, 0).describe().startswith(f"in this process, {os.cpu_count()} thread")
    asked = [argparse.Namespace(**{**vars(nothing), name: 1}) for name in vars(nothing)]
    for args, useful in [(nothing, 1), *((args, 0) for args in asked)]:
        with pytest.raises(Started):
            driver.plan_actors(args, useful)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(Started):
        driver.plan_actors(nothing, 0)
