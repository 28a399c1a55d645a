"""The benchmark: that it measures what it says, on sizes too small to mean anything."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clarity import native_search
from clarity.objectives import LatentObjective
from clarity.search import SearchConfig, descend


@pytest.fixture(scope="module")
def benchmark(load_job: Any) -> Iterator[Any]:
    module = load_job("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.measures, "CONFIG", SearchConfig(min_target_prob=0.9, max_steps=8))
        yield module


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_baselines_make_the_updates_of_the_plain_engine(benchmark: ModuleType) -> None:
    layers, codes, target = benchmark.measures.cluster_case(3, 5, 4, 0.1)
    codes, target = codes[:9], target[:9]
    rows = {"target": target, "reference": codes}
    objective = LatentObjective(layers, benchmark.measures.CONFIG.distance_weight)
    plain = int(descend(objective, codes, rows, benchmark.measures.CONFIG, engine="plain").steps.sum())
    assert plain > 9
    for baseline in (
        benchmark.measures.one_at_a_time,
        benchmark.measures.batched_autograd,
        partial(benchmark.measures.search, "batched", 1),
    ):
        assert abs(baseline(layers, codes, target) - plain) <= 2


def test_benchmark_writes_figures_and_goals(
    benchmark: ModuleType, tmp_path: Path, threads: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures"
    parts = ["--parts", "search", "training", "--scale", "0.005", "--repeats", "1", "--threads", "1"]
    assert benchmark.main([*parts, "--out", str(out)]) == 0
    found = json.loads((out / "benchmark.json").read_text())
    text = (out / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    first, second = found["search"]
    assert first["sizes"] == [16, 16, 16, 10]
    assert first["members"] == 50
    assert first["kflop_per_step"] == 134.4
    assert second["sizes"] == [128, 16, 16, 4]
    native = ["native"] if native_search.modules() else []
    for name in ("one at a time", "batched autograd", "plain", "batched", *native):
        run = first["engines"][name]
        assert run["gflops"] == pytest.approx(run["search_steps_per_second"] * 134.4e-6)
        assert f"| {name} |" in text
    assert found["training"]["ratio"] > 0
    assert "| goal | asked | found | |" in text


def test_benchmark_checks_the_engines_of_a_device(
    benchmark: ModuleType, tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures"
    sizes = ["--device", "cpu", "--scale", "0.03", "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert benchmark.main(["--parts", "checks", "networks", *sizes]) == 0
    found = json.loads((out / "benchmark.json").read_text())
    assert {check["variant"] for check in found["checks"]} == {"plain", "thresholds", "fixed"}
    assert {run["precision"] for run in found["networks"]} == {"float32", "bfloat16"}
    text = (out / "benchmark.md").read_text()
    assert "agrees" in text and "| encode, cpu, beta_vae, bfloat16 |" in text
    # An engine that moves along the fixed directions is found out.
    real = benchmark.measures.descend

    def careless(objective: Any, *args: Any, engine: str, **options: Any) -> Any:
        if engine != "plain":
            objective = LatentObjective(objective.layers, objective.distance_weight)
        return real(objective, *args, engine=engine, **options)

    monkeypatch.setattr(benchmark.measures, "descend", careless)
    assert benchmark.main(["--parts", "checks", *sizes]) == 1
    assert "DIFFERS" in (out / "benchmark.md").read_text()


def test_an_engine_or_a_part_that_fails_leaves_the_others_measured(
    benchmark: ModuleType, tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = benchmark.measures.descend

    def failing(*args: Any, engine: str, **options: Any) -> Any:
        if engine == "batched":
            raise RuntimeError("CUDA error: out of\nmemory")
        return real(*args, engine=engine, **options)

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(benchmark.measures, "descend", failing)
    monkeypatch.setattr(benchmark.measures, "time_training", no_memory)
    parts = ["--parts", "checks", "search", "training", "machine", "--device", "cpu"]
    sizes = ["--scale", "0.005", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    assert benchmark.main([*parts, *sizes]) == 1
    found, text = (tmp_path / name for name in ("benchmark.json", "benchmark.md"))
    measured, said = json.loads(found.read_text()), text.read_text()
    case = measured["search"][0]
    assert {"plain", "batched autograd"} <= case["engines"].keys() and "batched" not in case["engines"]
    assert case["failed"] == {"batched": "RuntimeError: CUDA error: out of memory"}
    assert "| batched, cpu, M 20, D 128, K 4, fixed | 64 | 0.00% | 0.00% | RuntimeError: CUDA error" in said
    assert "| batched | FAILED | RuntimeError: CUDA error" in said
    assert "FAILED: training: RuntimeError: no memory is left" in said and "sgemm_gflops" in said


def test_limit_of_the_gpus_kernel_is_a_third_of_a_product_in_tf32(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = torch.backends.cuda.matmul
    before, seen = products.fp32_precision, []

    def timed(*_: object) -> float:
        seen.append(products.fp32_precision)
        return 1e-3

    monkeypatch.setattr(benchmark.measures, "timed", timed)
    assert benchmark.measures.limit("triton", "cpu") * 3 == benchmark.measures.limit("native", "cpu") > 0
    assert seen == ["tf32"] * 3 + ["ieee"] * 3
    assert products.fp32_precision == before


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 256, 256), (1, 8, 8)])
def test_timed_images_of_a_gpu_have_maps_that_cudnn_can_count(
    benchmark: ModuleType, shape: tuple[int, int, int]
) -> None:
    count = benchmark.measures.num_images(shape, "cuda")
    assert 1024 <= count <= 65_536 and 32 * shape[1] * shape[2] * count <= 2**31


def test_benchmark_on_a_device_needs_no_ray(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["--device", "cpu", "--parts", "job", "--model", "m", "--out", str(tmp_path)]) == 2
    assert "--parts: job and memory measure the job on Ray; leave --device out" in capsys.readouterr().err
    assert "ray" not in {name for name in vars(benchmark)} | {name for name in vars(benchmark.measures)}


def test_benchmark_measures_the_stages_of_a_job(
    benchmark: ModuleType, tiny_digits_model: Path, tmp_path: Path, threads: Any
) -> None:
    out = tmp_path / "figures"
    arguments = ["--parts", "stages", "--model", str(tiny_digits_model), "--limit", "7", "--threads", "1"]
    assert benchmark.main([*arguments, "--out", str(out)]) == 0
    stages = json.loads((out / "benchmark.json").read_text())["stages"]
    assert stages["pairs"] == 7 * 9
    assert {"read", "search", "pictures", "write"} <= set(stages["seconds_by_stage"])
    assert not list((out / "scratch").iterdir()), "audits of the benchmark are thrown away"


def test_a_shard_that_fails_is_a_part_that_failed(
    benchmark: ModuleType, tiny_digits_model: Path, tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "unpack_row", lambda row: {"note": {"stage": "explain", "error": "no kernel"}})
    arguments = ["--parts", "stages", "--model", str(tiny_digits_model), "--limit", "7", "--threads", "1"]
    assert benchmark.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "FAILED: stages: RuntimeError: stage explain: no kernel" in (tmp_path / "benchmark.md").read_text()


def test_benchmark_asks_for_a_model_where_it_needs_one(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["--parts", "job", "--out", str(tmp_path / "figures")]) == 2
    assert "--model: the parts stages, job and memory need one" in capsys.readouterr().err


def test_memory_is_summed_over_a_process_and_its_children(benchmark: ModuleType) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'held = bytearray(60_000_000);"
        "print(1, flush=True); input()'], stdin=subprocess.PIPE); input(); child.communicate(b'x')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert benchmark.proportional_bytes(process.pid) > 60_000_000
        assert benchmark.proportional_bytes(process.pid) > benchmark.proportional_set(process.pid) + 50_000_000
        process.communicate(b"\n")
    assert benchmark.proportional_bytes(os.getpid()) > 10_000_000


def test_job_of_the_benchmark_gets_the_flags_of_the_data_and_its_memory_is_watched(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "explain_all.py"
    command.write_text(
        "import json, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(parents=True)\n"
        "names = ('images', 'pairs', 'mean_steps', 'seconds', 'seconds_by_stage')\n"
        "(out / 'summary.json').write_text(json.dumps(dict.fromkeys(names) | {'engines': sys.argv[1:]}))\n"
        "time.sleep(1.5)\n"
    )
    monkeypatch.setattr(benchmark, "JOBS", tmp_path)
    given = ["--data", "mine", "--columns", "image=img", "label=kind", "--model", "m", "--out", str(tmp_path)]
    args = benchmark.new_parser().parse_args(given)
    found = benchmark.run_job(args, "few", "--limit", "3", watch=True)
    assert found["engines"][4:9] == ["--data", "mine", "--columns", "image=img", "label=kind"]
    assert found["peak_bytes"] > 1_000_000 and found["wall_seconds"] > 1
    assert benchmark.run_job(args, "few", "--limit", "3")["peak_bytes"] == 0


def test_goals_are_judged_by_what_was_found(benchmark: ModuleType) -> None:
    run = {"images": 10, "pairs": 90_000, "seconds": 75.0}
    found = {
        "job": {"as_planned": run, "seconds_after_startup": 69.0},
        "stages": {"seconds": 50.0},
        "memory": {"ratio": 1.05, "runs": [{"images": 6}, {"images": 60}]},
        "training": {"ratio": 5.9},
    }
    judged = {what: (asked, value, ok) for what, asked, value, ok in benchmark.goals_of(found)}
    assert judged == {
        "whole job after start-up, 1,500 pairs a second": ("60 s", "69.0 s", False),
        "whole job against the same stages in one process": ("at most 1.15 x", "1.38 x", False),
        "peak memory, 60 images against 6": ("at most 1.1 x", "1.05 x", True),
        "50 members stacked against in sequence": ("6 x", "5.9 x", False),
    }
