"""What runs on a GPU gives what a CPU gives, to rounding; skipped where there is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from bars import arguments, write_bars
from torch import Tensor

import clarity
from clarity import schema
from clarity.attributes import AttributeHeads
from clarity.explainer import Explainer
from clarity.judges import build_judge, judge_rows
from clarity.methods import METHODS
from clarity.model import Model
from clarity.objectives import LatentObjective
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.search import ENGINES, SearchConfig, why_not
from clarity.training.plan import DECODERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # what torch says of a device is no failure
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = [f"image{number:02d}" for number in range(24)]


@pytest.fixture
def judged(model: Model) -> Model:
    """A model with everything that a search can ask for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.judge = build_judge(model.image_shape, model.num_classes).eval().requires_grad_(False)
        model.heads = AttributeHeads(("wings", "legs"), model.latent_dim).eval().requires_grad_(False)
    return model


def shard_of(model: Model) -> pa.Table:
    pixels = np.random.default_rng(0).integers(0, 256, (len(IDS), int(np.prod(model.image_shape))), np.uint8)
    nothing = pa.nulls(len(IDS), pa.string())
    return pa.table(
        [pa.array(IDS), nothing, schema.fixed_size_list(pixels), nothing], schema=schema.shard_schema(model.image_shape)
    )


def explained(model: Model, device: str, method: str, config: SearchConfig, **options: Any) -> pa.Table:
    return Explainer(model, method, config, device=device, **options).explain_shard(shard_of(model)).counterfactuals


def rows_of(model: Model, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """What each network makes of images and codes on its device, on the CPU."""
    assert model.judge is not None and model.image_ensemble is not None
    found = {
        "codes": encode_rows(model.vae, x)[0],
        "images": decode_rows(model.vae, z),
        "latent": logits_rows(model.ensemble, z),
        "image": logits_rows(model.image_ensemble, x),
        "judge": torch.from_numpy(judge_rows(model.judge, x)),
    }
    return {name: values.cpu() for name, values in found.items()}


def test_rows_on_a_gpu_are_those_of_a_cpu_and_the_same_each_time(judged: Model) -> None:
    x = torch.rand((1500, *judged.image_shape), generator=torch.Generator().manual_seed(0))
    z, _ = encode_rows(judged.vae, x)
    expected = rows_of(judged, x, z)
    judged.to("cuda")
    first, again = rows_of(judged, x.cuda(), z.cuda()), rows_of(judged, x.cuda(), z.cuda())
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        # Convolutions in TF32 would be off by many times as much.
        torch.testing.assert_close(values, expected[name], atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_method_finds_the_same_on_a_gpu(judged: Model, method: str, refine: bool) -> None:
    config = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3, refine=refine)
    expected = explained(judged, "cpu", method, config, engine="plain", min_judge_prob=0.2)
    found = explained(judged, "cuda", method, config, engine="plain", min_judge_prob=0.2)
    same = found["steps"].to_numpy() == expected["steps"].to_numpy()
    assert same.mean() > 0.95 and found["converged"].to_numpy().any()
    codes = [schema.matrix(table["z_cf"])[same] for table in (found, expected)]
    assert np.median(np.abs(codes[0] - codes[1]).max(1)) < 1e-4


@pytest.mark.parametrize("engine", [name for name in ENGINES if not name.startswith("native-")])
@pytest.mark.parametrize("keep", [(), ("wings",)])
def test_engine_finds_the_same_on_a_gpu(judged: Model, engine: str, keep: tuple[str, ...]) -> None:
    config = SearchConfig(min_target_prob=0.6, max_steps=200)
    expected = explained(judged, "cpu", "clarity", config, engine="plain", keep=keep)
    if missing := why_not(engine, LatentObjective(judged.ensemble.layers(), 0.0), "cuda"):
        pytest.skip(f"engine {engine} {missing}")
    found = explained(judged, "cuda", "clarity", config, engine=engine, keep=keep)
    assert (np.abs(found["steps"].to_numpy() - expected["steps"].to_numpy()) <= 1).mean() > 0.95
    assert (found["converged"].to_numpy() == expected["converged"].to_numpy()).mean() > 0.95


@pytest.mark.parametrize("decoder", DECODERS)
def test_model_is_trained_on_a_gpu(decoder: str, tmp_path: Path) -> None:
    data, lines = write_bars(tmp_path / "bars", 120), list[str]()
    fields = arguments(image_members=2, num_folds=2, decoder=decoder, judge_updates=30)
    fields["vae_fields"] = fields["vae_fields"] | {"label_weight": 2.0}
    model = clarity.train("folder", tmp_path / "model", data=data, device="cuda", log=lines.append, **fields)
    assert model.device.type == "cuda" and model.judge is not None and (model.sharp is not None) == (decoder == "sharp")
    assert model.card["evaluation"]["judge"]["accuracy"] > 0.6, "the judge has learned"
    loaded = clarity.load(tmp_path / "model")
    assert loaded.device.type == "cpu" and loaded.fingerprint == model.fingerprint
