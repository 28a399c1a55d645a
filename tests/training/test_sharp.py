"""The sharp decoder: trained on a finished model, cut and resumed, and what it changes in an explanation."""

import dataclasses
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bars import BarsGuide, arguments, bars, files_of, write_bars
from torch import Tensor

import clarity
from clarity import schema, storage
from clarity.data import open_dataset
from clarity.explainer import Explainer
from clarity.ids import in_judges_half
from clarity.images import encode_png
from clarity.judges import build_judge
from clarity.model import Model, load_tensors, save_model
from clarity.rows import decode_rows
from clarity.search import SearchConfig
from clarity.training.directory import begin, finish
from clarity.training.loops import VAETraining, guide_loss, weights_of
from clarity.training.plan import TrainingPlan, plan_training
from clarity.training.sharp import train_sharp
from clarity.training.stages import STAGES, TRAINED, Worker, load_images, run_stages
from clarity.vae import Decoder

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
TRAINING = VAETraining(epochs=3, min_updates=0, batch_size=16, learning_rate=0.003)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 120 pictures in class folders."""
    return write_bars(tmp_path_factory.mktemp("bars"), 120)


def plan_of(folder: Path, out: Path, decoder: str) -> TrainingPlan:
    dataset = open_dataset("folder", folder, "train", unlabelled=True)
    fields = arguments(num_members=2, decoder=decoder)
    plan = plan_training(str(out), dataset, dataclasses.replace(dataset, split="test"), **fields)
    return dataclasses.replace(plan, sharp_training=TRAINING)


def trained(plan: TrainingPlan) -> Model:
    assert not begin(plan)
    run_stages(plan, TRAINED, Worker())
    return finish(plan)


def with_sharp(model: Model) -> Model:
    """The model with another decoder than its VAE's."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return dataclasses.replace(model, sharp=Decoder(model.vae.config).eval().requires_grad_(False))


def shard_of(model: Model, ids: list[str]) -> pa.Table:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 96), np.uint8)[[int(name) for name in ids]]
    columns = [ids, pa.nulls(len(ids), pa.string()), schema.fixed_size_list(pixels), pa.nulls(len(ids), pa.string())]
    return pa.table(columns, schema=schema.shard_schema(model.image_shape))


def test_finished_model_takes_a_sharp_decoder_and_keeps_all_else(folder: Path, tmp_path: Path) -> None:
    before = trained(plan_of(folder, tmp_path, "plain"))
    files = files_of(tmp_path)
    after = trained(plan_of(folder, tmp_path, "sharp"))
    assert {name: files_of(tmp_path)[name] for name in files} == files
    loaded = clarity.load(tmp_path)
    assert loaded.card["vae_updates"] == 3 * (108 // 16), "those of the plain VAE"
    assert before.sharp is None and loaded.sharp is not None and "sharp decoder" in repr(loaded)
    assert loaded.fingerprint == after.fingerprint != before.fingerprint
    z = torch.randn((7, 5), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(decode_rows(loaded.sharp, z), decode_rows(loaded.vae, z))
    assert begin(plan_of(folder, tmp_path, "sharp")) and plan_of(folder, tmp_path, "plain").decoder == "sharp"


def test_training_with_a_guide_goes_on_with_the_same_attributes_alone(folder: Path, tmp_path: Path) -> None:
    for number, decoder in enumerate(("plain", "sharp")):
        plan = plan_of(folder, tmp_path / str(number), decoder)
        begin(plan)
        wings = dataclasses.replace(plan, attributes=("wings",))
        if decoder == "plain":
            assert not begin(wings)
        else:
            with pytest.raises(ValueError, match="attributes: null there"):
                begin(wings)
    labelled = dataclasses.replace(plan.vae, label_weight=2.0)
    plan = dataclasses.replace(plan, out=str(tmp_path / "labelled"), vae=labelled, decoder="plain")
    begin(plan)
    with pytest.raises(ValueError, match="attributes: null there"):
        begin(dataclasses.replace(plan, attributes=("wings",)))


def test_cut_training_of_the_decoder_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clarity.training.stages.CHECKPOINT_SECONDS", 0.0)
    trained(plan_of(folder, tmp_path / "whole", "sharp"))
    plan = plan_of(folder, tmp_path / "cut", "sharp")

    class Cut(Exception):
        pass

    def log(line: str) -> None:
        if line.startswith("sharp decoder: epoch 2"):
            raise Cut

    begin(plan)
    with pytest.raises(Cut):
        run_stages(plan, TRAINED, Worker(log=log))
    assert int(load_tensors(plan.file("sharp.safetensors"))["epoch"]) == 1
    lines: list[str] = []
    begin(plan)
    run_stages(plan, TRAINED, Worker(log=lines.append))
    finish(plan)
    seen = [line.split("  ")[0] for line in lines]
    assert seen == ["reading 108 images", "sharp decoder: epoch 2/3", "sharp decoder: epoch 3/3"]
    name = "sharp.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_brings_the_pictures_nearer_and_leaves_the_vae() -> None:
    images, _ = bars(90)
    vae = networks.small_vae("conv", (1, 8, 12))
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    epochs = list(train_sharp(images, vae, dataclasses.replace(TRAINING, epochs=12)))
    assert epochs[-1].metrics["l1"] < 0.8 * epochs[0].metrics["l1"]
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    decoder = Decoder(vae.config)
    decoder.load_state_dict(weights_of(epochs[-1].state(), "decoder"))


def test_guide_makes_pictures_show_what_images_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clarity.training.sharp.GUIDE_WEIGHT", 0.5)
    images, _ = bars(90)
    x, vae, guide = images.float() / 255, networks.small_vae("conv", (1, 8, 12)), BarsGuide()
    excess = []
    for each in (None, guide):
        *_, last = train_sharp(images, vae, dataclasses.replace(TRAINING, epochs=20), each)
        decoder = Decoder(vae.config).eval()
        decoder.load_state_dict(weights_of(last.state(), "decoder"))
        with torch.no_grad():
            excess.append(float(guide_loss(guide, decoder(vae.encode(x)[0]), x) - guide_loss(guide, x, x)))
    assert excess[1] < 0.8 * excess[0]
    assert last.metrics["guide"] > 0


def test_training_in_bf16_with_a_guide_comes_close_and_keeps_float32_weights() -> None:
    images, _ = bars()
    vae, guide = networks.small_vae("conv", (1, 8, 12)), build_judge((1, 8, 12), 3).eval().requires_grad_(False)
    epochs = [list(train_sharp(images, vae, TRAINING, guide, precision=name))[-1] for name in ("fp32", "bf16")]
    full, short = (epoch.metrics for epoch in epochs)
    assert short == pytest.approx(full, rel=0.05) and short["guide"] != full["guide"]
    assert {value.dtype for value in weights_of(epochs[1].state(), "decoder").values() if value.ndim} == {torch.float32}


def test_guide_learns_what_is_known_of_images_that_the_judge_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"image{i}" for i in range(30)]
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), np.uint8)
    wings = [None if i % 3 == 0 else 4 * (i % 2) for i in range(30)]
    columns = {"image_id": names, "image": encode_png(pixels), "label": ["ant", "bee", None] * 10, "wings": wings} | {
        "split": ["train"] * 30
    }
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    dataset = open_dataset("parquet", tmp_path, unlabelled=True)
    fields = arguments(attributes=["wings"], decoder="sharp", recipe="paper")
    plan = plan_training(str(tmp_path.parent / "out"), dataset, None, **fields)
    given: list[Any] = []
    monkeypatch.setattr("clarity.training.guide.train_judge", lambda *all: given.extend(all) or [])
    STAGES["guide"].run(plan, Worker(), lambda: load_images(plan, dataset))
    net, images, truth, _, name, _ = given
    mine = [i for i in range(30) if not in_judges_half([names[i]])[0]]
    known = [
        [[1, 0], [0, 1], [-1, -1]][i % 3] + [-1 if wings[i] is None else int(wings[i] == 4)]
        for i in mine
        if i % 3 != 2 or wings[i] is not None
    ]
    assert name == "guide" and net.config.num_outputs == 3 and truth.tolist() == known
    assert np.array_equal(images, pixels[[i for i in mine if i % 3 != 2 or wings[i] is not None]])
    assert STAGES["guide"].done(plan) and storage.exists(plan.file("guide.safetensors"))


@pytest.mark.parametrize("method", ["clarity", "revise_e", "schut"])
def test_written_pictures_are_the_sharp_decoders_and_the_search_is_not(model: Model, method: str) -> None:
    sharp, shard = with_sharp(model), shard_of(model, list("0123"))
    (plain, drawn) = (Explainer(each, method, CONFIG).search_shard(shard) for each in (model, sharp))
    assert drawn.codes.equals(plain.codes)
    written = {"x_cf", "reencoded_class", "reencoded_target_prob"}
    if method == "schut":
        written = set()
    before, after = plain.counterfactuals, drawn.counterfactuals
    assert after.drop_columns(sorted(written)).equals(before.drop_columns(sorted(written)))
    if method != "schut":
        assert sharp.sharp is not None
        pixels = (decode_rows(sharp.sharp, codes_of(after)) * 255).round().to(torch.uint8)
        assert after["x_cf"].to_pylist() == [image.numpy().tobytes() for image in pixels]
        assert not after["x_cf"].equals(before["x_cf"])


def codes_of(table: pa.Table) -> Tensor:
    return torch.tensor(schema.matrix(table["z_cf"]))


def test_rows_with_a_sharp_decoder_do_not_depend_on_their_shard(model: Model) -> None:
    explainer = Explainer(with_sharp(model), config=CONFIG)
    whole = explainer.search_shard(shard_of(model, list("012345678"))).counterfactuals.to_pylist()
    parts = [explainer.search_shard(shard_of(model, list(ids))).counterfactuals for ids in ("84", "3", "017652")]
    alone = [row for part in parts for row in part.to_pylist()]
    assert sorted(alone, key=lambda row: (row["target"], row["image_id"])) == whole


def test_predictor_sees_the_sharp_reconstruction(model: Model) -> None:
    shown: list[np.ndarray] = []

    def predict(pixels: np.ndarray) -> np.ndarray:
        shown.append(pixels.copy())
        return np.full((len(pixels), 4), 0.25, np.float32)

    predict.classes, predict.mode, predict.size = list(model.class_names), "L", (8, 12)  # type: ignore[attr-defined]
    sharp = with_sharp(model)
    found = Explainer(sharp, config=CONFIG, predictor=predict).search_shard(shard_of(model, list("012")))
    assert sharp.sharp is not None
    z = torch.tensor(schema.matrix(found.codes["z"]))
    expected = (decode_rows(sharp.sharp, z) * 255).round().to(torch.uint8).numpy()
    assert any(np.array_equal(pixels[:3], expected) for pixels in shown)


def test_decode_draws_either_picture(model: Model, tmp_path: Path) -> None:
    sharp = with_sharp(model)
    save_model(sharp, storage.join(str(tmp_path), "model"))
    rows = Explainer(sharp, config=CONFIG).search_shard(shard_of(model, list("01"))).counterfactuals
    written = np.stack([np.frombuffer(image, np.uint8).reshape(1, 8, 12) for image in rows["x_cf"].to_pylist()])
    assert np.array_equal(clarity.decode(tmp_path, rows), written)
    plain = (decode_rows(model.vae, codes_of(rows)) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(clarity.decode(tmp_path, rows, decoder="plain"), plain)
    with pytest.raises(ValueError, match="unknown decoder 'blurred'; choose from written, plain"):
        clarity.decode(tmp_path, rows, decoder="blurred")


def test_unknown_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder: expected one of plain, sharp, got 'blurred'"):
        plan_of(folder, tmp_path, "blurred")
