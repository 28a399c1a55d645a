"""The training job on a real Ray: shared by workers, killed and resumed with others, and refused before it starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.torch
import torch
from bars import files_of, write_bars
from pictures import write_shapes
from predictors import write_onnx

import clarity
from clarity.predictor import load_predictor
from clarity.training.recipe import LEAST_LABELLED

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    *("--latent-dim", "5", "--channels", "6", "7", "--hidden", "6", "--num-members", "3", "--judge-updates", "3"),
    *("--recipe", "paper"),
    *("--vae-epochs", "2", "--ensemble-epochs", "2", "--image-epochs", "1"),
]


@pytest.fixture(scope="module")
def job(load_job: Any) -> Any:
    """jobs/train.py as a module, for what needs no Ray."""
    return load_job("train")


@pytest.fixture(scope="module")
def environment(ray_local: Any) -> Iterator[dict[str, str]]:
    """Commands that join the session's Ray."""
    address = ray_local.get_runtime_context().gcs_address
    yield os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures in three class folders."""
    return write_bars(tmp_path_factory.mktemp("bars"), 90)


def command(folder: Path, out: Path | str, *more: str) -> list[str]:
    data = ["--dataset", "folder", "--data", str(folder), "--out", str(out)]
    return [sys.executable, str(ROOT / "jobs" / "train.py"), *data, *SMALL, *more]


def run(folder: Path, out: Path | str, *more: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, out, *more), capture_output=True, text=True, env=env, timeout=300)


def test_job_trains_resumes_with_other_workers_and_reports(
    job: Any, folder: Path, tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    extras = ["--image-members", "2", "--folds", "2"]
    # Killed as soon as the VAE is done, it leaves what it has.
    process = subprocess.Popen(command(folder, out, *extras), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("encoded 80") or line.startswith("encoded"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(60)
    assert not (out / "model.json").exists()
    vae = (out / "_training" / "vae.safetensors").read_bytes()
    time.sleep(1)
    resumed = run(folder, out, *extras, "--workers", "2", env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "vae: epoch" not in resumed.stdout
    assert "latent classifiers (2 of 3 members): epoch 2/2  loss" in resumed.stdout
    assert "image classifiers (member 1 of 2): epoch 1/1  loss" in resumed.stdout
    assert re.search(r"member 1 of 2\): epoch 1/1  loss \S+  accuracy \S+  \d+:\d\d\n", resumed.stdout)
    assert re.search(r"images of folder at 8 x 12 \(\d+ bar0, \d+ bar1, \d+ bar2\)\n", resumed.stdout)
    assert re.search(r"\n +bar0 \S+%, bar1 \S+%, bar2 \S+%\n", resumed.stdout)
    assert "judge: update 3/3  loss" in resumed.stdout and "judge      accuracy" in resumed.stdout
    assert "baseline   accuracy" in resumed.stdout
    assert "ensemble   accuracy" in resumed.stdout and f"model      {out}" in resumed.stdout
    model = clarity.load(out)
    assert model.image_ensemble is not None and len(model.folds) == 2
    assert model.card["metrics"]["images"] > 0

    # Given the same VAE, one process without Ray makes the same members.
    from clarity.training.directory import begin, finish
    from clarity.training.stages import TRAINED, Worker, run_stages

    plan = job.make_plan(job.new_parser().parse_args(command(folder, tmp_path / "alone", *extras)[2:]))
    begin(plan)
    (tmp_path / "alone" / "_training" / "vae.safetensors").write_bytes(vae)
    run_stages(plan, TRAINED, Worker())
    finish(plan)
    alone, shared = files_of(tmp_path / "alone"), files_of(out)
    assert alone.keys() == shared.keys() and "judge.safetensors" in alone
    # The judge's convolutions, like the VAE's, sum in an order that follows the number of threads.
    assert {**alone, "judge.safetensors": b""} == {**shared, "judge.safetensors": b""}

    assert job.main(command(folder, out, *extras)[2:]) == 0
    assert capsys.readouterr().out.startswith("already finished")


def test_jobs_take_colour_images_that_are_neither_digits_nor_faces(
    ray_local: Any, load_job: Any, tmp_path: Path
) -> None:
    write_shapes(tmp_path / "shapes", 120, (20, 28))
    out, audit = tmp_path / "model", tmp_path / "audit"
    network = {"architecture": "beta_vae", "vae_fields": {"latent_dim": 9, "channels": (8, 10, 12)}, "hidden": (6,)}
    short = {"num_members": 3, "judge_updates": 3, "vae_epochs": 2, "ensemble_epochs": 2}
    model = clarity.train("folder", out, data=tmp_path / "shapes", **network, **short)
    assert model.image_shape == (3, 20, 28) and model.vae.config.latent_dim == 9
    assert model.class_names == ("cross", "disc", "square")
    data = ["--dataset", "folder", "--data", str(tmp_path / "shapes")]
    flags = ["--model", str(out), "--out", str(audit), "--max-steps", "5"]
    assert load_job("explain_all").main([*data, *flags]) == 0 and load_job("verify").main([str(audit)]) == 0
    found = clarity.read_audit(audit)
    assert found.counterfactuals.count_rows() == 2 * found.codes.count_rows() > 0
    assert (audit / "report.html").exists()


def test_training_that_diverges_ends_at_once_in_one_line(
    ray_local: Any, job: Any, folder: Path, tmp_path: Path, capfd: Any
) -> None:
    assert job.main([*command(folder, tmp_path / "model")[2:], "--vae-learning-rate", "1e30"]) == 2
    out, err = capfd.readouterr()
    assert out.count("reading ") == 1, "one attempt"
    said = r"error: --vae-learning-rate: the VAE's loss is nan after epoch \d(, \S+ after the first)?: lower it"
    assert re.fullmatch(said, err.splitlines()[-1]), err
    assert signal.getsignal(signal.SIGINT).__module__ == "driver", "Ray Train's handler would end a job with code 0"


@pytest.mark.slow
def test_workers_are_tried_again_where_one_died_but_not_where_one_raises_a_value_error(
    ray_local: Any, job: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    plan = job.make_plan(job.new_parser().parse_args(command(folder, tmp_path / "model")[2:]))

    def work(config: dict[str, Any]) -> None:
        rank = ray.train.get_context().get_world_rank()
        config["log"](f"worker {rank} works")
        if rank == 1:
            time.sleep(1)  # until the other waits
            if not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os._exit(1)
            raise ValueError("out: the worker of rank 1 does not see it")
        torch.distributed.all_reduce(torch.zeros(1))

    monkeypatch.setattr(job, "work", work)
    monkeypatch.setattr(job, "NODE_DEATH_S", 0)
    with pytest.raises(ValueError, match="rank 1 does not see it"):
        job.fit(plan, ["vae"], 2)
    assert capfd.readouterr().out.count("worker 1 works\n") == 2


def test_a_worker_that_dies_each_time_is_tried_again_three_times(
    ray_local: Any, job: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    attempts: list[str] = []

    class Trainer:
        def __init__(self, *_: Any, run_config: Any, torch_config: Any, **__: Any) -> None:
            attempts.append(run_config.name)
            assert torch_config.timeout_s >= 12 * 3600, "the others wait while the first one trains a guide"

        def fit(self) -> None:
            raise ray.train.WorkerGroupError("it died", {0: RuntimeError("it died")})

    plan = job.make_plan(job.new_parser().parse_args(command(folder, tmp_path / "model")[2:]))
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(job, "NODE_DEATH_S", 0)
    with pytest.raises(ray.train.WorkerGroupError, match="it died"):
        job.fit(plan, ["vae"], 1)
    assert len(set(attempts)) == 4
    told = "a worker died or failed (RuntimeError: it died); trying again from the last checkpoints\n"
    assert capfd.readouterr().out.count(told) == 3


def test_workers_of_a_training_keep_the_working_directory(
    ray_local: Any, job: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """From which a predictor may read files; Ray Train's own lies below the model's."""
    plan = job.make_plan(job.new_parser().parse_args(command(folder, tmp_path / "model")[2:]))
    monkeypatch.setattr(job, "work", lambda config: config["log"](f"in {os.getcwd()}"))
    job.fit(plan, ["vae"], 1)
    assert f"in {os.getcwd()}\n" in capfd.readouterr().out


@pytest.mark.slow
def test_job_searches_the_recipe_once(folder: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """The folder is too small for trials, so the paper's values are taken, by the same path."""
    found = run(folder, tmp_path / "model", "--recipe", "auto", env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("recipe: searching beta, adversarial_eps, label_weight on the training split\n")
    assert "recipe: too few labelled images for a search" in found.stdout
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    paper = {"latent_dim": 5, "beta": 1.0, "label_weight": 0.0, "adversarial_eps": 0.2, "hidden": [6]}
    assert card["recipe"]["chosen"] == paper
    again = run(folder, tmp_path / "model", "--recipe", "auto", env=environment)
    assert again.returncode == 0 and again.stdout.startswith("already finished")


@pytest.mark.slow
def test_job_shares_the_vae_among_workers(folder: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    found = run(folder, tmp_path / "model", "--workers", "2", env=environment)
    assert found.returncode == 0, found.stderr
    assert "vae: epoch 2/2  loss" in found.stdout
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert card["data"]["source"] == "folder" and card["class_names"] == ["bar0", "bar1", "bar2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/no/such/place"], "found nothing at /no/such/place"),
        (["--split", "sideways"], "error: --split: expected one of train, test, all, which "),
        (["--held-out", "sideways"], "error: --held-out: expected one of train, test, all, which "),
        (["--seed", "-1"], "error: --seed: expected at least 0, got -1"),
        (["--columns", "label=kind"], "error: --columns: expected a table of labels in "),
        (["--columns", "image"], "error: --columns: expected NAME=COLUMN, got image"),
        (["--columns", "size=x"], "error: --columns: expected names of image, "),
        (["--loss", "hinge"], "unknown reconstruction loss 'hinge'; choose from bce"),
        (["--vae-epochs", "0"], "error: --vae-epochs: expected at least 1, got 0"),
        (["--ensemble-learning-rate", "-1"], "--ensemble-learning-rate: expected more than 0, got -1.0"),
        (["--folds", "1"], "error: --folds: expected 0 or at least 2, got 1"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--image-size", "1", "2", "3"], "--image-size: expected a side, or height and width"),
        (["--out", "s3://user:secret@bucket/model"], "s3://"),
    ],
)
def test_job_refuses_bad_input_before_ray_starts(
    job: Any, folder: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(folder, tmp_path / "model")[2:]
    assert job.main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "secret" not in error
    assert not (tmp_path / "model").exists()


def test_job_refuses_a_relative_place_in_a_submitted_job(
    job: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert job.main(command(folder, "runs/model")[2:]) == 2
    assert "--out runs/model: a relative path" in capsys.readouterr().err


def test_dry_run_says_why_no_recipe_is_searched(
    job: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--dataset", "folder", "--data", str(folder), "--out", str(tmp_path / "model"), "--dry-run"]
    assert job.main([*argv, "--recipe", "auto"]) == 0
    out = capsys.readouterr().out
    assert f"no search for a recipe: it takes {LEAST_LABELLED} labelled images, there are " in out
    assert out.count("less on several; without measuring\n") == 1
    assert job.main([*argv, "--recipe", "paper"]) == 0
    assert "no search" not in capsys.readouterr().out, "none was asked for"
    monkeypatch.setattr(job, "LEAST_LABELLED", 1)
    monkeypatch.setattr("clarity.training.cost.LEAST_LABELLED", 1)
    assert job.main([*argv, "--recipe", "auto"]) == 0
    out = capsys.readouterr().out
    assert "no search" not in out and "without measuring and the counterfactuals of the search" in out


def test_job_says_what_it_keeps_of_what_is_there_and_refuses_another_model_before_a_search(
    job: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*flags: str) -> str:
        code = job.main([*command(folder, tmp_path / "model")[2:], *flags])
        out, err = capsys.readouterr()
        assert code == 2 * bool(err)
        return str(out + err)

    def of_networks(said: str) -> list[str]:
        return [line for line in said.splitlines() if re.match("kept|error|already|about|.* updates? ", line)]

    from clarity.training.directory import begin, finish
    from clarity.training.stages import TRAINED, Worker, run_stages

    plan = job.make_plan(job.new_parser().parse_args(command(folder, tmp_path / "model")[2:]))
    begin(plan)
    run_stages(plan, ["vae"], Worker())
    first, judge, ensemble, _ = of_networks(says("--dry-run"))
    assert first == "kept: VAE; to train: ensemble, judge"
    assert judge.startswith("judge ") and ensemble.startswith("ensemble ")
    holds = f"error: --out: {tmp_path / 'model'} holds "
    there = "the unfinished training of another model: --vae-epochs: 2 there, 3 here. Choose another directory"
    for flags in (["--dry-run"], [], ["--recipe", "auto"]):
        assert says("--vae-epochs", "3", *flags).startswith(holds + there), flags
    begun = "an unfinished training that began without a search for beta, adversarial_eps, label_weight. Choose"
    assert says("--recipe", "auto").startswith(holds + begun)

    run_stages(plan, TRAINED, Worker())
    finish(plan)
    assert of_networks(says("--dry-run")) == ["kept: VAE, ensemble, judge; to train: nothing"]
    assert says().startswith("already finished\n")
    assert says("--recipe", "auto").startswith("already finished (recipe: none was searched there, auto here)\n")
    assert says("--held-out", "none").startswith("already finished (held_out: test there, none here)\n")
    assert says("--num-members", "4").startswith(f"{holds}another model: --num-members: 3 there, 4 here. Choose")
    assert says("--seed", "1").startswith(f"{holds}another model: --seed: 0 there, 1 here. Choose")
    first, folds, _ = of_networks(says("--dry-run", "--folds", "2"))
    assert first == "kept: VAE, ensemble, judge; to train: ensembles of folds (num_folds: 0 there, 2 here)"
    assert re.match(r"ensembles of folds +2 x 2 updates ", folds)
    first, judge, _ = of_networks(says("--dry-run", "--judge-updates", "4"))
    assert first == "kept: VAE, ensemble; to train: judge (judge_updates: 3 there, 4 here)"
    assert re.match("judge +4 updates ", judge)


def test_stages_are_divided_by_nodes_or_by_networks(job: Any, folder: Path, tmp_path: Path) -> None:
    argv = command(folder, tmp_path / "model", "--image-members", "5")[2:]
    plan = job.make_plan(job.new_parser().parse_args(argv))
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    one_a_node, one_a_network = (2, 4, False), (5, 1, False)
    expected = dict.fromkeys(("vae", "encode", "guide", "sharp"), one_a_node)
    expected |= dict.fromkeys(("latent", "images", "judge"), one_a_network)
    assert {name: job.divide(plan, [name], nodes, None) for name in job.TRAINED} == expected
    assert job.divide(plan, ["recipe"], nodes, 1) == (1, 4, False) and job.divide(plan, ["vae"], [], 3) == (3, 1, False)
    for stage in ("vae", "latent"):
        with pytest.raises(ValueError, match="--workers 9: Ray offers 8 CPUs; ask for fewer"):
            job.divide(plan, [stage], nodes, 9)
    few = job.make_plan(job.new_parser().parse_args([*argv, "--vae-batch-size", "2"]))
    assert job.divide(few, ["vae"], nodes, 3) == (2, 4, False), "a worker without an image of a batch has the loss nan"
    assert job.divide(few, ["vae"], [{"CPU": 8.0, "GPU": 8.0}], None) == (2, 1, True)
    assert job.divide(plan, ["latent"], nodes, 7) == (5, 1, False), "of five networks each"
    assert job.divide(plan, ["latent"], [{"CPU": 4.0, "GPU": 3.0}], None) == (3, 1, True)


def test_flags_take_their_defaults_from_the_dataclasses(job: Any) -> None:
    from clarity.training.loops import IMAGE_TRAINING, EnsembleTraining, VAETraining

    plan = job.make_plan(job.new_parser().parse_args(["--out", "/nowhere"]))
    assert plan.vae_training == VAETraining() and plan.ensemble_training == EnsembleTraining()
    assert plan.image_training == IMAGE_TRAINING and plan.ensemble.num_members == 50
    assert plan.vae == clarity.vae.VAEConfig() and plan.image_members == plan.num_folds == 0
    other = job.make_plan(
        job.new_parser().parse_args(
            ["--out", "/nowhere", "--vae", "beta_vae", "--seed", "3", "--image-size", "32", "--label-weight", "2"]
        )
    )
    assert other.vae.label_weight == 2
    assert other.vae.channels == (32, 64, 128, 256, 512) and other.vae.image_shape == (1, 32, 32)
    colour = job.make_plan(job.new_parser().parse_args(["--out", "/nowhere", "--mode", "RGB", "--center-crop", "20"]))
    assert colour.vae.image_shape == (3, 28, 28) and colour.preprocessing.center_crop == 20
    assert other.vae_training.seed == other.ensemble_training.seed == other.image_training.seed == 3


def test_relative_onnx_file_is_found_wherever_a_worker_runs_and_shown_by_a_dry_run(
    job: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_onnx(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = command(folder, tmp_path / "model", "--predictor", "model.onnx")[2:]
    plan = job.make_plan(job.new_parser().parse_args(argv))
    monkeypatch.chdir("/")
    assert load_predictor(plan.predictor).digest == load_predictor(tmp_path / "model.onnx").digest
    monkeypatch.chdir(tmp_path)
    assert job.main([*argv, "--dry-run"]) == 0
    assert re.search(r"predictor  .*model.onnx: image \S+ \(label \S+\) is ", capsys.readouterr().out)


def test_job_holds_out_validation_where_there_is_no_test_and_says_so(
    job: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / split)
    argv = ["--dataset", "folder", "--data", str(tmp_path), "--out", str(tmp_path.parent / "model")]
    plan = job.make_plan(job.new_parser().parse_args(argv))
    assert (plan.dataset.split, plan.held_out.split) == ("train", "validation")
    assert capsys.readouterr().out == "held out: the split validation, as the data has no test split\n"


def test_job_says_which_classes_were_not_measured(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = {"accuracy": 0.5, "member_accuracy_mean": 0.5, "balanced_accuracy": 0.5, "calibration_error": 0.1}
    card = {"class_names": ["a", "b", "c"], "metrics": {"ensemble": quality | {"per_class": {"b": 0.5}}}}
    monkeypatch.setattr(job, "read_card", lambda _: card)
    plan = job.make_plan(job.new_parser().parse_args(["--out", "/nowhere"]))
    assert job.describe(plan).splitlines()[-1].lstrip() == "not measured, no held-out image: a, c"
    card["metrics"] = {}
    assert job.describe(plan) == "nothing was held out to measure on"
