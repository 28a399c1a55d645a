"""The workers of a job: they fill an audit, count attempts, and turn failures into notes."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audits import fill

from clarity import data, schema
from clarity.audit.commits import MAX_ATTEMPTS, begin_attempt, claim
from clarity.audit.plan import Plan
from clarity.audit.read import read_audit
from clarity.audit.verify import verify
from clarity.checks import Requirements
from clarity.model import Model, load_model, save_model
from clarity.notebook import redecoder
from clarity.planning import make_checks, make_plan
from clarity.predictions import add_predictions, read_predictions
from clarity.predictor import load_predictor
from clarity.search import SearchConfig
from clarity.worker import ExplainShard, Work, read_shard, shard_item, unpack, write_shard


@pytest.fixture
def work(tiny_digits_model: Path, tmp_path: Path) -> Any:
    """The work on 12 digits, claimed, in shards of 5."""
    model = load_model(tiny_digits_model)
    dataset = data.open_dataset("digits", split="test")
    listing = data.list_images(dataset).slice(0, 12)
    plan = make_plan(model, dataset, listing, method="clarity", config=SearchConfig(max_steps=8), shard_rows=5, trace=6)
    uri = str(tmp_path / "audit")
    with claim(uri, plan, str(tiny_digits_model)) as held:
        yield Work(uri, held.run, plan, dataset, model.preprocessing), listing


def item(listing: pa.Table, work: Work, shard: int) -> pa.Table:
    return pa.Table.from_pylist([shard_item(work.plan, shard, listing)])


def test_items_hold_a_small_part_of_the_listing(work: Any) -> None:
    """The driver holds the item of each shard beside the listing."""
    work, _ = work
    ids = pa.array([f"photos/of/people/{row:08d}.png" for row in range(256)])
    sizes = pa.array(np.random.default_rng(0).integers(10_000, 20_000, 256))
    columns = [ids, ids, pa.array(np.zeros(256, int)), sizes, pa.array(["cat", "dog"] * 128)]
    listing = pa.table(dict(zip(data.LISTING_COLUMNS, columns)))
    plan = replace(work.plan, shards=[{"start": 0, "stop": 256, "ids": ""}])
    packed = shard_item(plan, 0, listing)["listing"]
    assert unpack(packed).equals(listing)
    assert len(packed) < listing.nbytes / 4


def note_of(batch: pa.Table) -> dict[str, Any]:
    assert len(batch) == 1
    return json.loads(batch["note"][0].as_py())


def test_workers_fill_an_audit(work: Any) -> None:
    for ended in fill(*work):
        assert ended.column_names == ["shard", "note"]
        note = note_of(ended)
        assert "error" not in note
        assert {"read", "encode", "search", "decode", "reencode", "pictures", "write"} <= set(note["seconds"])
    work, _ = work
    found = verify(work.uri, redecode=redecoder(work.uri))
    assert found.ok, found.problems
    assert (found.images, found.pairs) == (12, 12 * 9)
    assert found.redecoded > 100
    traces = read_audit(work.uri).traces
    assert traces is not None
    assert len(set(traces.to_table()["image_id"].to_pylist())) == 6


def test_readers_and_writers_do_not_load_torch() -> None:
    code = "import sys, clarity.worker; print([name for name in ('torch', 'ray') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.stdout.strip() == "[]", run.stderr


def test_work_travels_without_torch(work: Any) -> None:
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], input=pickle.dumps(work[0]), cwd=root).returncode == 0


class PanicException(BaseException):
    """As pyo3 has it, beside Exception."""


@pytest.mark.parametrize("error", [ValueError("planted"), PanicException("planted")])
def test_workers_turn_exceptions_into_notes(work: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    work, listing = work
    first = item(listing, work, 0)
    monkeypatch.setattr(data, "read_images", fail)
    failed = read_shard(first, work)
    note = note_of(write_shard(ExplainShard(work)(failed), work))
    assert note == {"stage": "read", "error": f"{type(error).__name__}: planted"}
    assert [note_of(read_shard(first, work)).get("given_up") for _ in range(3)] == [None, None, True]


class AcceleratorError(RuntimeError):
    """As torch has it."""


def test_worker_whose_gpu_fails_ends_its_process_as_a_counted_attempt(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    work, listing = work
    images = read_shard(item(listing, work, 1), work)
    monkeypatch.setattr("clarity.explainer.Explainer.search_shard", fail)
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(SystemExit, match="illegal memory access"):
            ExplainShard(work, threads=1)(images)
    assert note_of(ExplainShard(work, threads=1)(images))["given_up"]


def test_workers_count_a_death_as_an_attempt(work: Any) -> None:
    work, listing = work
    images = read_shard(item(listing, work, 1), work)
    for _ in range(MAX_ATTEMPTS):
        begin_attempt(work.uri, work.run, 1, "explain")  # and no end to it
    note = note_of(ExplainShard(work, threads=1)(images))
    assert note["given_up"]
    assert "died" in note["error"]


def test_workers_do_not_repeat_what_is_committed(work: Any) -> None:
    work, listing = work
    images = read_shard(item(listing, work, 0), work)
    explained = ExplainShard(work, threads=1)(images)
    assert explained.num_columns > 2
    ended = ExplainShard(work, write_shard, threads=1)(images)
    assert ended.column_names == ["shard", "note"] and note_of(ended)["seconds"]["write"] > 0
    assert note_of(ExplainShard(work, threads=1)(images)) == {"committed": True}
    assert note_of(write_shard(explained, work)) == {"committed": True}


def test_workers_say_what_a_broken_model_lacks(work: Any) -> None:
    work, listing = work
    Path(work.uri, "model", "vae.safetensors").unlink()
    note = note_of(ExplainShard(work, threads=1)(read_shard(item(listing, work, 0), work)))
    assert note["stage"] == "explain"
    assert "vae.safetensors" in note["error"]


def test_workers_refuse_another_model_than_the_plans(work: Any, model: Model) -> None:
    work, listing = work
    save_model(model, Path(work.uri, "model"), card={})  # whole, and with sums of its own
    note = note_of(ExplainShard(work, threads=1)(read_shard(item(listing, work, 0), work)))
    assert note["stage"] == "explain"
    assert "expected the model of the plan" in note["error"]


def test_predictions_reach_codes_and_decide_the_plan(tiny_digits_model: Path, tmp_path: Path) -> None:
    model, dataset = load_model(tiny_digits_model), data.open_dataset("digits", split="test")
    everything = data.list_images(dataset)
    ids = everything["image_id"].to_pylist()
    probs = np.eye(10, dtype=np.float32)[[3, 5, 8]]
    plans, file = [], str(tmp_path / "predictions.parquet")
    for shift in (0, 1):
        told = pa.table({"image_id": [ids[2], ids[0], "stranger"], "probabilities": np.roll(probs, shift, 1).tolist()})
        pq.write_table(told, file)
        listing = add_predictions(everything.slice(0, 4), read_predictions(file, everything), model.class_names)
        config = SearchConfig(max_steps=3)
        plans.append(make_plan(model, dataset, listing, method="clarity", config=config, shard_rows=2))
    assert plans[0].fingerprint != plans[1].fingerprint
    assert Plan.from_json(json.loads(json.dumps(plans[1].to_json()))).codes_schema() == plans[1].codes_schema()
    uri = str(tmp_path / "audit")
    with claim(uri, plans[1], str(tiny_digits_model)) as held:
        fill(Work(uri, held.run, plans[1], dataset, model.preprocessing), listing)
        found = verify(uri, redecode=redecoder(uri))
        assert found.ok, found.problems
        codes = read_audit(uri).codes.to_table()
        assert codes["prediction"].to_pylist() == [6, None, 4, None]
        assert codes["prediction_probs"].to_pylist()[2] == np.eye(10)[4].tolist()
        summary = read_audit(uri).summary()
        agree = sum(a == b for a, b in zip(codes["prediction"].to_pylist(), codes["source"].to_pylist()))
        assert summary["predictions"] == {"images": 2, "agree": agree}
        assert summary["left_out"] == {"predictions for images that are not in the data": 1}


THEIRS = """
import os
import numpy as np

def predict(pixels):
    if os.path.exists("fail"):
        raise RuntimeError("out of order")
    scores = pixels.reshape(len(pixels), -1)[:, :100].reshape(len(pixels), 10, 10).mean(2) / 64
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

predict.classes = [str(digit) for digit in (3, 1, 2, 0, 4, 5, 6, 7, 8, 9)]
predict.mode = "RGB"
predict.size = (14, 20)
"""


@pytest.fixture
def predicted(tiny_digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The work on 6 digits in shards of 3, explained for a function of the user's in the working directory."""
    name = f"theirs_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    model, dataset, source = load_model(tiny_digits_model), data.open_dataset("digits", split="test"), f"{name}:predict"
    listing, predictor = data.list_images(dataset).slice(0, 6), load_predictor(source)
    config = SearchConfig(min_target_prob=0.2, max_steps=30)
    checks = make_checks(model, config, Requirements(min_reencoded_prob=0.01, min_predictor_prob=0.1), predictor)
    plan = make_plan(model, dataset, listing, method="clarity", config=config, shard_rows=3, checks=checks)
    uri = str(tmp_path / "audit")
    with claim(uri, plan, str(tiny_digits_model)) as held:
        yield Work(uri, held.run, plan, dataset, model.preprocessing, predictor.preprocessing, source), listing


def test_workers_ask_the_predictor_about_originals_and_written_images(predicted: Any) -> None:
    work, listing = predicted
    for note in map(note_of, fill(work, listing)):
        assert "error" not in note and note["seconds"]["predictor"] > 0
    found = verify(work.uri, redecode=redecoder(work.uri))
    assert found.ok, found.problems
    opened = read_audit(work.uri)
    codes, theirs = opened.codes.to_table(), load_predictor(work.predictor)
    originals = data.read_images(work.dataset, listing, work.predictor_preprocessing)
    probs = theirs.predict(schema.matrix(originals["image"]).reshape(-1, 3, 14, 20))
    prediction = [theirs.class_names[k] for k in probs.argmax(1)]
    order = np.argsort(originals["image_id"].to_pylist())
    assert codes["source_name"].to_pylist() == codes["prediction_name"].to_pylist() == [prediction[i] for i in order]
    summary = opened.summary()
    confirmed = sum(opened.counterfactuals.to_table()["confirmed"].to_pylist())
    assert (summary["checks"]["confirmed"], summary["checks"]["pairs"]) == (confirmed, 6 * 9)
    ensemble = schema.matrix(codes["probs"]).argmax(1)
    agree = int((ensemble == codes["prediction"].to_numpy()).sum())
    assert summary["predictions"] == {"images": 6, "agree": agree}


def test_workers_note_a_predictor_that_fails_or_is_another(predicted: Any) -> None:
    work, listing = predicted
    images, explainer = read_shard(item(listing, work, 0), work), ExplainShard(work, threads=1)
    Path("fail").touch()
    note = note_of(explainer(images))
    assert note["stage"] == "explain" and "failed: RuntimeError: out of order" in note["error"]
    Path("fail").unlink()
    assert "error" not in note_of(explainer(images))
    source = Path(work.predictor.partition(":")[0] + ".py")
    other = source.with_name("others.py")
    other.write_text(source.read_text().replace("/ 64", "/ 32"))
    another = replace(work, predictor="others:predict")
    assert "expected that of the plan, found another" in note_of(ExplainShard(another)(images))["error"]
