"""The model directory: what is written comes back bit by bit, and what is broken is rejected with its reason."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import clarity
from clarity.attributes import AttributeHeads
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.judges import build_judge, judge_rows
from clarity.model import FILES, MODEL_FILE, Model, load_model, load_tensors, save_model
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.vae import Decoder


@pytest.fixture
def full_model(tiny_model: Model) -> Model:
    return completed(tiny_model)


def completed(tiny_model: Model) -> Model:
    """The tiny model with an image ensemble of 3 members, two folds, a judge, a sharp decoder and two heads."""
    torch.manual_seed(8)
    config = EnsembleConfig(num_classes=4, latent_dim=5, hidden=(6, 7), num_members=3)
    tiny_model.image_ensemble = ImageEnsemble(config, tiny_model.vae.config).eval()
    tiny_model.folds = tuple(LatentEnsemble(tiny_model.ensemble.config).eval() for _ in range(2))
    tiny_model.judge = build_judge(tiny_model.image_shape, 4).eval()
    tiny_model.sharp = Decoder(tiny_model.vae.config).eval()
    tiny_model.heads = AttributeHeads(("red", "old"), 5).eval()
    return tiny_model


def edit_card(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((path / MODEL_FILE).read_text())
    change(card)
    (path / MODEL_FILE).write_text(json.dumps(card))


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a weight file, with a card whose sum agrees with them."""
    (path / name).write_bytes(data)
    edit_card(path, lambda card: card["files"].update({name: {"sha256": hashlib.sha256(data).hexdigest()}}))


def change_tensors(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_tensors(path / name)
    change(tensors)
    replace_file(path, name, safetensors.torch.save(tensors))


def flip_byte(path: Path) -> None:
    data = bytearray((path / FILES["vae"]).read_bytes())
    data[-5] ^= 1
    (path / FILES["vae"]).write_bytes(bytes(data))


class Bomb:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def torch_save(path: Path) -> None:
    file = path.parent / "weights.pt"
    torch.save({"a": torch.zeros(2)}, file)
    replace_file(path, FILES["vae"], file.read_bytes())


def cut_short(path: Path) -> None:
    text = (path / MODEL_FILE).read_text()
    (path / MODEL_FILE).write_text(text[: len(text) // 2])


def card(entry: str = "", **changes: Any) -> Callable[[Path], None]:
    """Changes the card, or one entry of it."""
    return lambda path: edit_card(path, lambda card: (card[entry] if entry else card).update(changes))


def removed(*keys: str) -> Callable[[Path], None]:
    """Takes an entry out of the card."""
    return lambda path: edit_card(path, lambda card: (card[keys[0]] if keys[1:] else card).pop(keys[-1]))


def file(part: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replaces the weights of a part, made from those of the VAE."""
    return lambda path: replace_file(path, FILES[part], content((path / FILES["vae"]).read_bytes()))


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda path: change_tensors(path, FILES[part], change)


def double(tensors: dict[str, torch.Tensor]) -> None:
    tensors["biases.0"] = tensors["biases.0"].double()


OUTSIDE = {"../../etc/passwd": {"sha256": "0"}}

#: name, what is done to a whole model directory, what the message must say.
BAD_MODELS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no card", lambda p: (p / MODEL_FILE).unlink(), "no model at .*model.json, which training writes last"),
    ("card cut short", cut_short, "expected JSON in .*model.json"),
    ("card of another kind", lambda p: (p / MODEL_FILE).write_text("[1]"), "a model of format 1, found 'list'"),
    ("card of another format", card(format=9), "format 1, found 9"),
    ("card lacks an entry", removed("preprocessing"), "lacks 'preprocessing'"),
    ("no weights", lambda p: (p / FILES["vae"]).unlink(), "vae.safetensors is missing; copy the model directory again"),
    ("a changed byte", flip_byte, "vae.safetensors has changed: its sha256 is"),
    ("weights cut short", file("vae", lambda data: data[:-9]), "no readable safe"),
    ("a pickle", file("vae", lambda _: pickle.dumps(Bomb())), "is a pickle, which can run any code"),
    ("a torch.save file", torch_save, "is a pickle, which can run any code"),
    ("empty weights", file("ensemble", lambda _: b""), "ensemble.safetensors is no readable safetensors"),
    ("a path outside", card("files", **OUTSIDE), "'../../etc/passwd' is none of the files of a model"),
    ("a file without its sum", removed("files", FILES["vae"]), "names no vae.safetensors"),
    ("an unknown architecture", card("vae", architecture="gan"), "unknown VAE architecture 'gan'; choose from"),
    ("an unknown field", card("vae", depth=3), "vae is not usable: .*'depth'"),
    ("another class count", card(class_names=["ant", "bee", "cow"]), "class_names has 3 classes, ensemble has 4"),
    ("a class twice", card(class_names=["ant"] * 4), "a name stands there twice"),
    ("another shape", card("preprocessing", height=12, width=8), r"of shape \(1, 12, 8\), the VAE takes \(1, 8, 12\)"),
    ("another latent dim", card("ensemble", latent_dim=6), "latent_dim of the VAE is 5, of the ensemble 6"),
    ("too many members", card("ensemble", num_members=10**12), r"ensemble.safetensors: .*\(1000000000000, .*\(2, "),
    ("a tensor too many", tensors("vae", lambda t: t.update(extra=torch.zeros(1))), "model.json describes: extra"),
    ("another type", tensors("ensemble", double), "biases.0 is torch.float32 .* found torch.float64"),
    ("NaN", tensors("ensemble", lambda t: t["biases.0"].fill_(torch.nan)), "biases.0 holds a NaN or an infinity"),
    ("tensors of another part", file("image_ensemble", bytes), "image_ensemble.safetensors does not hold the tensors"),
    ("a silly number of folds", card(folds=10**9), "a count from 0 to 1000"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
def test_load_says_what_is_wrong(
    full_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(full_model, tmp_path / "model")
    load_model(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


def test_model_comes_back_bit_by_bit(full_model: Model, tmp_path: Path) -> None:
    written = save_model(full_model, tmp_path, card={"metrics": {"accuracy": 0.5}})
    loaded = clarity.load(tmp_path)
    assert loaded.card == json.loads(json.dumps(written)) == json.loads((tmp_path / MODEL_FILE).read_text())
    assert loaded.card["metrics"] == {"accuracy": 0.5} and loaded.card["versions"]["torch"] == torch.__version__
    assert loaded.fingerprint == full_model.fingerprint != ""
    assert loaded.class_names == full_model.class_names and loaded.preprocessing == full_model.preprocessing
    assert (loaded.latent_dim, loaded.num_classes, loaded.image_shape) == (5, 4, (1, 8, 12))
    assert loaded.device == torch.device("cpu")
    x, z = torch.rand(3, 1, 8, 12), torch.randn(3, 5)
    assert torch.equal(encode_rows(loaded.vae, x)[0], encode_rows(full_model.vae, x)[0])
    assert torch.equal(decode_rows(loaded.vae, z), decode_rows(full_model.vae, z))
    assert torch.equal(logits_rows(loaded.ensemble, z), logits_rows(full_model.ensemble, z))
    assert loaded.image_ensemble is not None and full_model.image_ensemble is not None
    assert torch.equal(logits_rows(loaded.image_ensemble, x), logits_rows(full_model.image_ensemble, x))
    assert loaded.judge is not None and full_model.judge is not None
    assert np.array_equal(judge_rows(loaded.judge, x), judge_rows(full_model.judge, x))
    for ours, theirs in zip(loaded.folds, full_model.folds, strict=True):
        assert torch.equal(logits_rows(ours, z), logits_rows(theirs, z))
    assert not any(p.requires_grad for p in loaded.vae.parameters())


def test_same_model_has_the_same_bytes(full_model: Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(full_model, tmp_path / name)
    for name in FILES.values():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fingerprint_changes_with_what_determines_results(full_model: Model, tmp_path: Path) -> None:
    first = save_model(full_model, tmp_path / "a")["fingerprint"]
    full_model.image_ensemble, full_model.folds, full_model.judge = None, (), None
    assert save_model(full_model, tmp_path / "b")["fingerprint"] == first
    full_model.sharp = None
    plain = save_model(full_model, tmp_path / "e")["fingerprint"]
    full_model.class_names = ("ant", "bee", "cow", "elk")
    second = save_model(full_model, tmp_path / "c")["fingerprint"]
    with torch.no_grad():
        full_model.ensemble.biases[0][0, 0] += 1
    third = save_model(full_model, tmp_path / "d")["fingerprint"]
    assert len({first, plain, second, third}) == 4


def test_card_is_written_last(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    from clarity import storage

    real = storage.write_bytes

    def note(uri: Any, data: bytes, **more: Any) -> None:
        names.append(Path(uri).name)
        real(uri, data, **more)

    monkeypatch.setattr(storage, "write_bytes", note)
    save_model(tiny_model, tmp_path)
    assert names == [FILES["vae"], FILES["ensemble"], MODEL_FILE]
    loaded = load_model(tmp_path)
    assert loaded.image_ensemble is None and loaded.folds == () and loaded.judge is None


def test_model_repr_is_a_few_readable_lines(full_model: Model) -> None:
    full_model.card = {"metrics": {"ensemble": {"accuracy": 0.954}}}
    assert repr(full_model).splitlines() == [
        "Clarity model tiny on cpu",
        "  images    1 x 8 x 12, 4 classes: ant, bee, cow, dog",
        "  VAE       conv, 5 latent dimensions, sharp decoder",
        "  ensemble  2 members, 2 folds, image ensemble of 3, held-out accuracy 95.4%",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("audit", r"got .*/audit, an audit: name .*/audit/model"),
        ("runs", r"a directory that holds one: name .*/runs/model"),
        ("runs/model/model.json", "a file: name the directory that training wrote"),
        ("runs/model/vae.safetensors", "a file: name the directory"),
        ("net.pt", "a network of your own: train a model of this data .* as predictions, or itself as the predictor"),
        ("net.ONNX", "a network of your own"),
        ("notes.txt", "a file: name the directory that training wrote"),
    ],
)
def test_load_says_what_else_is_there_and_what_would_do(
    name: str, said: str, tiny_model: Model, tmp_path: Path
) -> None:
    for directory in ("runs", "audit"):
        save_model(tiny_model, tmp_path / directory / "model", card={})
    for file in ("audit/plan.json", "net.pt", "net.ONNX", "notes.txt"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / name)
