"""Plans: JSON, fingerprints, differences, shards."""

import json
from dataclasses import replace
from typing import Any

import pytest
from shards import IDS

from clarity.audit.plan import Plan, ids_digest, rows_per_shard, shard_table


def test_plan_survives_json_and_notices_changes(plan: Plan) -> None:
    value = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(value) == plan
    value["config"]["max_steps"] = 21
    with pytest.raises(ValueError, match="fingerprint"):
        Plan.from_json(value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "latent"}, 'method: "clarity" in the audit, "latent" in this run'),
        ({"config": {"min_target_prob": 0.9, "max_steps": 20}}, "config.min_target_prob: 0.99 in the audit, 0.9"),
        ({"images": "none"}, "images"),
        ({"targets": [1, 2]}, "targets"),
        ({"only": "misclassified"}, "only"),
        ({"trace": 3}, "trace"),
        ({"shards": shard_table(IDS, 3)}, "shards.count: 3 in the audit, 2 in this run"),
        ({"checks": {"predictor": "a" * 64}}, "checks.predictor: none in the audit, one in this run"),
        ({"versions": {"clarity": "9"}}, "versions.clarity"),
    ],
)
def test_plan_names_what_differs(plan: Plan, change: dict[str, Any], named: str) -> None:
    other = replace(plan, **change)
    assert other.fingerprint != plan.fingerprint
    assert any(line.startswith(named) for line in plan.differences(other)), plan.differences(other)


def test_plan_names_other_data_and_another_model(plan: Plan) -> None:
    other = replace(plan, dataset=plan.dataset | {"listing": "f01"}, shards=shard_table(IDS[::-1], 2))
    assert plan.differences(other) == ["data: other images or labels than in the audit"]
    fewer = replace(plan, dataset=plan.dataset | {"listing": "f01", "num_images": 3}, shards=shard_table(IDS[:3], 2))
    assert plan.differences(fewer) == ["data: 5 images in the audit, 3 in this run"]
    assert plan.differences(replace(plan, model=plan.model | {"fingerprint": "d"}))[0].startswith("model.fingerprint")


def test_plan_does_not_depend_on_date_or_place_of_the_data(plan: Plan) -> None:
    other = replace(plan, created="2027", dataset=plan.dataset | {"data": "/elsewhere"})
    assert other.fingerprint == plan.fingerprint
    assert not plan.differences(other)


def test_rows_per_shard_keeps_every_limit() -> None:
    assert rows_per_shard(60_000, 10_000) == 256
    assert rows_per_shard(60_000, 1 << 20) == 32
    assert rows_per_shard(60_000, 10_000, gpu=True) == 4096
    assert rows_per_shard(60_000, 1 << 20, gpu=True) == 512
    assert rows_per_shard(500, 10_000, gpu=True) == 63
    assert rows_per_shard(60_000, 1 << 30) == 1
    assert rows_per_shard(500, 10_000) == 63
    assert rows_per_shard(60_000, 10_000, seconds_per_image=5.0) == 4
    assert rows_per_shard(60_000, 10_000, seconds_per_image=500.0) == 1


def test_shard_table_covers_every_image_once() -> None:
    table = shard_table(IDS, 2)
    assert [(span["start"], span["stop"]) for span in table] == [(0, 2), (2, 4), (4, 5)]
    assert table[0]["ids"] == ids_digest(["a", "b"]) != ids_digest(["ab"])
    with pytest.raises(ValueError, match="at least 1"):
        shard_table(IDS, 0)
