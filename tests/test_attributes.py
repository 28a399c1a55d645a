"""Attributes as linear heads on codes: what the search keeps, what tables say of it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from audits import SEARCHED, make_tables, write_audit

import clarity
from clarity import schema
from clarity.attributes import AttributeHeads, attribute_rows
from clarity.audit.queries import connect
from clarity.explainer import Explainer
from clarity.findings.attributes import check_kept
from clarity.findings.finding import Finding, NotChecked, gather
from clarity.findings.searches import check_unconverged
from clarity.ids import noise
from clarity.images import decode_png
from clarity.model import Model, load_model, save_model
from clarity.planning import describe_kept
from clarity.report.page import write_report
from clarity.rows import encode_rows
from clarity.search import SearchConfig

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
KEEP = ["old", "red"]


@pytest.fixture
def heads_model(model: Model) -> Model:
    """The tiny model with the heads of three attributes."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return replace(model, heads=AttributeHeads(("red", "tall", "old"), 5).requires_grad_(False).eval())


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 1, 8, 12), np.uint8)


def logits_of(model: Model, codes: np.ndarray, keep: list[str]) -> np.ndarray:
    assert model.heads is not None
    return model.heads.select(keep)(torch.from_numpy(codes.copy())).numpy()


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("method", ["clarity", "latent"])
def test_kept_attributes_have_the_same_logits_at_every_counterfactual(
    heads_model: Model, images: np.ndarray, method: str, refine: bool
) -> None:
    config = replace(CONFIG, refine=refine)
    # A threshold on the written image that few pairs pass at once, so that rungs are taken too.
    pairs = clarity.explain(heads_model, images, method=method, config=config, keep=KEEP, min_reencoded_prob=0.3)
    free = clarity.explain(heads_model, images, method=method, config=config, min_reencoded_prob=0.3)
    z, log_var = encode_rows(heads_model.vae, torch.from_numpy(images).float() / 255)
    if method == "latent":  # starts from a sample
        z = z + torch.exp(log_var / 2) * torch.from_numpy(noise([str(i) for i in range(9)], 5))
    start = z.numpy()[[int(name) for name in pairs["image_id"].to_pylist()]]
    assert pairs["rungs"].to_numpy().max() > 0 and pairs["steps"].to_numpy().max() > 0
    before, after = (logits_of(heads_model, codes, KEEP) for codes in (start, schema.matrix(pairs["z_cf"])))
    assert np.abs(after - before).max() < 1e-4
    assert np.abs(logits_of(heads_model, schema.matrix(free["z_cf"]), KEEP) - before).max() > 0.1


def test_columns_hold_the_probabilities_of_the_kept_attributes(heads_model: Model, images: np.ndarray) -> None:
    pairs = clarity.explain(heads_model, images, config=CONFIG, keep=KEEP)
    assert pairs.schema.equals(schema.counterfactuals_schema(5, num_kept=2), check_metadata=True)
    assert heads_model.heads is not None
    heads = heads_model.heads.select(KEEP)
    index = [int(name) for name in pairs["image_id"].to_pylist()]
    written = decode_png(pairs["x_cf"], heads_model.image_shape)
    for name, shown in (("kept_probs_initial", images[index]), ("kept_probs_final", written)):
        z = encode_rows(heads_model.vae, torch.tensor(shown).float() / 255)[0]
        assert (schema.matrix(pairs[name]) == attribute_rows(heads, z)).all()
    free = clarity.explain(heads_model, images, config=CONFIG)
    assert free.schema.equals(schema.counterfactuals_schema(5)) and "kept_probs_final" not in free.column_names


def test_a_row_with_kept_attributes_does_not_depend_on_the_other_pairs(heads_model: Model, images: np.ndarray) -> None:
    whole = clarity.explain(heads_model, images, config=CONFIG, keep=KEEP)
    for target, name in enumerate(heads_model.class_names):
        alone = clarity.explain(heads_model, images, [name], config=CONFIG, keep=KEEP)
        mine = whole.filter(pc.equal(whole["target"], target))
        assert len(alone) and all(alone[column].equals(mine[column]) for column in ("image_id", "z_cf", "steps"))


def test_every_direction_of_a_kept_attribute_is_kept(heads_model: Model, images: np.ndarray) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        heads = AttributeHeads(("red", "tall", "old"), 5, 2).requires_grad_(False).eval()
    model = replace(heads_model, heads=heads)
    pairs = clarity.explain(model, images, config=CONFIG, keep=["old", "red"])
    z = encode_rows(model.vae, torch.from_numpy(images).float() / 255)[0].numpy()
    moved = schema.matrix(pairs["z_cf"]) - z[[int(name) for name in pairs["image_id"].to_pylist()]]
    rows = [2, 0]
    for layer in (heads.linear, heads.further[0]):
        assert np.abs(moved @ layer.weight.numpy()[rows].T).max() < 1e-5
    assert np.abs(moved).max() > 0.1 and heads.select(["old"]).directions().shape == (5, 2)
    with pytest.raises(ValueError, match="fewer than 3 attributes, for a code of 5 dimensions and 2 directions each"):
        heads.directions()


def test_model_keeps_its_directions_and_one_of_an_earlier_version_has_one(heads_model: Model, tmp_path: Path) -> None:
    heads = AttributeHeads(("red", "tall", "old"), 5, 2).requires_grad_(False).eval()
    save_model(replace(heads_model, heads=heads), tmp_path / "two")
    loaded = load_model(tmp_path / "two").heads
    assert loaded is not None and loaded.num_directions == 2
    assert all(torch.equal(tensor, heads.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    card = save_model(heads_model, tmp_path / "one")
    del card["attribute_directions"]
    (tmp_path / "one" / "model.json").write_text(json.dumps(card))
    loaded = load_model(tmp_path / "one").heads
    assert loaded is not None and loaded.num_directions == 1


@pytest.mark.parametrize(
    ("keep", "method", "message"),
    [
        (["blue"], "clarity", "keep: no head for attribute 'blue'; choose from red, tall, old"),
        (["red", "red"], "clarity", "keep: attribute 'red' is named twice"),
        ("red", "clarity", "keep: expected a list of attributes, got 'red'"),
        (["red"], "fgsm", "keep: method 'fgsm' changes pixels"),
    ],
)
def test_explainer_says_what_cannot_be_kept(heads_model: Model, keep: list[str], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explainer(heads_model, method, CONFIG, keep=keep)


def test_further_direction_that_depends_on_others_names_its_attribute() -> None:
    heads = AttributeHeads(["red", "tall"], 9, num_directions=2)
    heads.state_dict()["further.0.weight"][1] = 2 * heads.linear.weight[0].detach()
    with pytest.raises(ValueError, match="keep: 'tall' depends on the attributes before it"):
        heads.directions()


def test_explainer_refuses_to_keep_what_the_model_cannot(model: Model, heads_model: Model) -> None:
    with pytest.raises(ValueError, match="keep: this model has no heads"):
        Explainer(model, "clarity", CONFIG, keep=["red"])
    assert heads_model.heads is not None
    heads_model.heads.linear.weight.data[2] = 3 * heads_model.heads.linear.weight[0]
    with pytest.raises(ValueError, match="keep: 'old' depends on the attributes before it"):
        Explainer(heads_model, "clarity", CONFIG, keep=["red", "old"])
    full = replace(heads_model, heads=AttributeHeads(tuple("abcde"), 5).eval())
    with pytest.raises(ValueError, match="fewer than 5 attributes, for a code of 5 dimensions"):
        Explainer(full, "clarity", CONFIG, keep=list("abcde"))


def with_kept(pairs: pa.Table, initial: np.ndarray, final: np.ndarray) -> pa.Table:
    """Pairs with probabilities (P, A) of kept attributes, in the order of the schema."""
    pairs = pairs.append_column("kept_probs_initial", schema.fixed_size_list(initial.astype(np.float32)))
    pairs = pairs.append_column("kept_probs_final", schema.fixed_size_list(final.astype(np.float32)))
    return pairs.select(schema.counterfactuals_schema(5, num_kept=initial.shape[1]).names)


def test_audit_and_report_tell_what_was_kept(tmp_path: Path) -> None:
    tables = make_tables(60)
    probs = np.linspace(0, 1, 2 * len(tables.counterfactuals)).reshape(-1, 2)
    tables = replace(tables, counterfactuals=with_kept(tables.counterfactuals, probs, probs))
    uri = write_audit(tmp_path / "audit", tables, checks={"keep": ["Male", "Young"]})
    audit = clarity.read_audit(uri)
    assert audit.plan.keep == ["Male", "Young"] and audit.complete
    assert audit.counterfactuals.schema.field("kept_probs_final").type == pa.list_(pa.float32(), 2)
    assert audit.counterfactuals.schema.metadata[b"clarity.keep"] == b'["Male", "Young"]'
    made = write_report([uri])
    assert "kept" in {finding.kind for finding in made.findings}
    assert "without changing Male, Young." in Path(made.uri).read_text()


def test_a_run_says_how_well_the_heads_know_what_is_kept(heads_model: Model) -> None:
    model = replace(heads_model, card={"metrics": {"attributes": {"red": {"balanced_accuracy": 0.808}}}})
    told = describe_kept(model, ["red", "old"])
    assert told == "keeping    red (balanced accuracy 80.8%), old, as far as the code knows them"


def test_finding_counts_pairs_out_of_reach_and_pictures_that_change_sides() -> None:
    tables = make_tables(120)
    pairs = tables.counterfactuals
    index = np.arange(len(pairs))
    converged = index % 10 > 0  # one in ten is out of reach, and all of those are with the first attribute
    initial = np.stack([np.where(index % 2, 0.1, 0.9), np.full(len(index), 0.2)], 1)
    final = initial.copy()
    final[index % 5 == 1, 1] = 0.8
    pairs = pairs.set_column(pairs.column_names.index("converged"), "converged", pa.array(converged))
    pairs, names = with_kept(pairs, initial, final), tables.class_names
    found = check_kept(gather(connect(tables.codes, pairs), names, **SEARCHED, keep=["Male", "Young"]))
    assert isinstance(found, Finding)
    assert found.level == "look"
    assert found.figures["missed"] == (~converged).sum()
    assert found.figures["flipped"] == {"Male": 0.0, "Young": (index[converged] % 5 == 1).mean()}
    assert "by image, 20 % with “Male” and 0 % without “Male”" in found.sentence
    # Some of these pairs would fail without it, too.
    assert found.title.endswith("did not converge") and "without --keep tells" in found.evidence
    assert isinstance(check_kept(gather(connect(tables.codes, tables.counterfactuals), names, **SEARCHED)), NotChecked)


@pytest.mark.parametrize(("keep", "level"), [(["Male", "Young"], "look"), ([], "alert")])
def test_pairs_that_kept_attributes_put_out_of_reach_are_not_probably_wrong(keep: list[str], level: str) -> None:
    tables = make_tables(120)
    pairs = tables.counterfactuals
    reached = pa.array(pairs["target"].to_numpy() != 1)
    pairs = pairs.set_column(pairs.column_names.index("converged"), "converged", reached)
    pairs = with_kept(pairs, *np.full((2, len(pairs), 2), 0.2))
    failed = check_unconverged(gather(connect(tables.codes, pairs), tables.class_names, **SEARCHED, keep=keep))
    assert isinstance(failed, Finding)
    assert failed.level == level and ("kept Male and Young" in failed.sentence) == bool(keep)


def test_finding_counts_what_a_held_out_judge_sees_flip() -> None:
    tables = make_tables(120)
    index = np.arange(len(tables.counterfactuals))
    probs = np.full((len(index), 2), 0.2)
    pairs, reached = with_kept(tables.counterfactuals, probs, probs), tables.counterfactuals["converged"].to_numpy()
    seen = pairs.select(["image_id", "target"])
    columns = {"attribute": "Male", "prob_initial": 0.2, "prob_final": np.where(index % 4 == 0, 0.7, 0.3)}
    for name, values in columns.items():
        seen = seen.append_column(name, pa.array(np.broadcast_to(values, len(index))))
    con = connect(tables.codes, pairs)
    con.register("attributes", seen)
    found = check_kept(gather(con, tables.class_names, **SEARCHED, keep=["Male", "Young"]))
    assert isinstance(found, Finding)
    assert found.figures["judged"] == {"Male": ((reached & (index % 4 == 0)).sum(), reached.sum())}
    assert "According to the held-out judge of attributes they flip: “Male” in 2" in found.sentence
    assert found.level == "look"
