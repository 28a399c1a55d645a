"""The plan of an audit: everything that decides its rows, and the table of its shards."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from clarity import schema, storage

#: Images of a shard at most, and bytes that it writes at most.
MAX_SHARD_ROWS = 256
MAX_SHARD_BYTES = 32 << 20
GPU_SHARD = 16
#: Seconds that the search of a shard should take at most.
SHARD_SECONDS = 20.0
#: Shards of a small data set at least, so that it overlaps and resumes too.
MIN_SHARDS = 8


@dataclass(frozen=True)
class Plan:
    """What an audit holds when it is complete; written once, never changed."""

    #: source, data, split, where, num_images, listing (its sha256), extra (name, type and digest of the columns that
    #: the listing adds to codes), left_out (reason -> count, informative), trained (whether the model was trained on
    #: some of the images; null: unknown)
    dataset: dict[str, Any]
    #: fingerprint, class_names, image_shape, latent_dim, num_folds (classifiers of folds, each for the images that it
    #: did not see; 0 for the ensemble alone), sums (of what else the method uses)
    model: dict[str, Any]
    method: str  # a key of METHODS
    config: dict[str, Any]  # of the search
    targets: list[int] | None  # class indices, or None for all
    images: str  # png or none
    shards: list[dict[str, Any]]  # {start, stop, ids} of each: rows of the listing, and a digest of their ids
    only: str = "all"  # all, or misclassified: the images that get pairs
    trace: int = 0  # how many of the listing's first images are traced
    versions: dict[str, str] = field(default_factory=dict)  # of what decides the bytes
    created: str = ""  # date, informative
    schema_version: int = schema.SCHEMA_VERSION  # of the tables
    #: what a counterfactual must satisfy beside the config, by the names of the Explainer's arguments:
    #: min_target_probs (a threshold for each class as a target), min_reencoded_prob, min_judge_prob, predictor (its
    #: digest), min_predictor_prob and keep (names of attributes); empty where none was asked for
    checks: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what decides the content of the data files: not the date, nor where the data lies."""
        return digest(self.identity())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index."""
        return list(self.model["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.model["image_shape"]
        return channels, height, width

    @property
    def num_images(self) -> int:
        """Images of the listing."""
        return int(self.dataset["num_images"])

    @property
    def pairs_per_image(self) -> int:
        """Pairs of an image at most; one less where a listed target is its source."""
        return len(self.class_names) - 1 if self.targets is None else len(self.targets)

    @property
    def requires_checks(self) -> bool:
        """Whether written images are checked, so that pairs are confirmed or not."""
        return bool(self.checks.keys() & {"min_reencoded_prob", "min_judge_prob", "predictor"})

    @property
    def keep(self) -> list[str]:
        """Attributes that the search keeps."""
        return list(self.checks.get("keep", []))

    @property
    def thresholds(self) -> tuple[float, float]:
        """The smallest and the largest threshold of the classes."""
        found = self.checks.get("min_target_probs", [self.config["min_target_prob"]])
        return min(found), max(found)

    def min_target_prob(self, targets: np.ndarray) -> np.ndarray:
        """The threshold of each target (P,), float32."""
        classes = np.full(len(self.class_names), self.config["min_target_prob"], np.float32)
        return np.asarray(self.checks.get("min_target_probs", classes), np.float32)[targets]

    def codes_schema(self) -> pa.Schema:
        """Schema of ``codes``, with the file metadata by which a table explains itself."""
        extra = [pa.field(name, schema.type_of(kind)) for name, kind, *_ in self.dataset.get("extra", [])]
        if "predictor" in self.checks:
            extra += schema.predictions_schema(len(self.class_names))
        table = schema.codes_schema(len(self.class_names), self.model["latent_dim"], extra)
        return table.with_metadata(self.file_metadata())

    def counterfactuals_schema(self) -> pa.Schema:
        """Schema of ``counterfactuals``, with the file metadata."""
        table = schema.counterfactuals_schema(self.model["latent_dim"], len(self.keep))
        return table.with_metadata(self.file_metadata())

    def differences(self, other: "Plan") -> list[str]:
        """What another plan decides differently, one line each: empty when both fill the same files."""
        mine, theirs = flatten(self.identity()), flatten(other.identity())
        names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        lines = []
        if "data.listing" in names:
            # Its digests say nothing to people, and other images are always cut into other shards.
            names = [name for name in names if not name.startswith(("data.listing", "data.num_images", "shards."))]
            lines = ["data: other images or labels than in the audit"]
            if self.num_images != other.num_images:
                lines = [f"data: {self.num_images} images in the audit, {other.num_images} in this run"]
        return lines + [
            f"{name}: {compared(mine.get(name), theirs.get(name), 'in the audit', 'in this run')}" for name in names
        ]

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return {"fingerprint": self.fingerprint, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> "Plan":
        """The inverse of ``to_json``; ValueError when it was altered."""
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or not names <= set(value):
            raise ValueError(f"expected a plan with {', '.join(sorted(names))}")
        if value["schema_version"] != schema.SCHEMA_VERSION:
            raise ValueError(f"its tables are of version {value['schema_version']}, not {schema.SCHEMA_VERSION}")
        plan = cls(**{name: value[name] for name in names})
        if plan.fingerprint != value.get("fingerprint"):
            raise ValueError("its fingerprint does not belong to its content")
        return plan

    def identity(self) -> dict[str, Any]:
        """What decides the content of the data files."""
        content = {k: v for k, v in asdict(self).items() if k not in ("created", "dataset", "shards")}
        content["data"] = {k: self.dataset.get(k) for k in ("listing", "num_images", "extra")}
        if "columns" in self.dataset:  # which column holds the images is not seen in the listing
            content["data"]["columns"] = self.dataset["columns"]
        if not self.checks:
            del content["checks"]
        content["shards"] = {"count": len(self.shards), "table": digest(self.shards)}
        return content

    def file_metadata(self) -> dict[str, str]:
        """Metadata by which a data file can be read on its own."""
        return {
            "clarity.schema_version": str(self.schema_version),
            "clarity.fingerprint": self.fingerprint,
            "clarity.class_names": json.dumps(self.class_names),
            "clarity.config": json.dumps(self.config, sort_keys=True),
            "clarity.method": self.method,
            "clarity.image_shape": ",".join(map(str, self.image_shape)),
            **({"clarity.keep": json.dumps(self.keep)} if self.keep else {}),
        }


def read_plan(uri: str) -> Plan:
    """The plan of an audit directory; ValueError where there is none, or a damaged one."""
    path = storage.join(uri, "plan.json")
    if not storage.exists(path):
        raise ValueError(f"expected an audit directory, found no plan.json in {storage.display(uri)}: check the path")
    try:
        return Plan.from_json(storage.read_json(path))
    except ValueError as error:
        message = f"{storage.display(path)} is damaged ({error}): restore it, or choose another directory"
        raise ValueError(message) from None


def rows_per_shard(num_images: int, bytes_per_image: float, seconds_per_image: float = 0.0, gpu: bool = False) -> int:
    """Images of a shard: at most MAX_SHARD_ROWS, MAX_SHARD_BYTES written and SHARD_SECONDS of search; at least 1.

    A GPU searches thousands of pairs at once and gets GPU_SHARD times as much.
    """
    times = GPU_SHARD if gpu else 1
    limits = [
        times * MAX_SHARD_ROWS,
        times * MAX_SHARD_BYTES / max(bytes_per_image, 1),
        max(-(-num_images // MIN_SHARDS), 32),
    ]
    if seconds_per_image > 0:
        # A power of two: two measurements of the same machine then mostly give the same files.
        limits.append(2 ** np.floor(np.log2(SHARD_SECONDS / seconds_per_image)))
    return int(max(1, min(limits)))


def shard_table(image_ids: pa.ChunkedArray | list[str], rows: int) -> list[dict[str, Any]]:
    """Consecutive shards of ``rows`` images: {start, stop, ids}. Ids become Python strings a shard at a time."""
    if rows < 1:
        raise ValueError(f"shard_rows: expected at least 1, got {rows}")
    column = pa.chunked_array([image_ids], pa.string()) if isinstance(image_ids, list) else image_ids
    parts = {start: column[start : start + rows] for start in range(0, len(column), rows)}
    return [
        {"start": start, "stop": start + len(ids), "ids": ids_digest(ids.to_pylist())} for start, ids in parts.items()
    ]


def ids_digest(image_ids: Iterable[str]) -> str:
    """Digest of a set of image ids, whatever their order."""
    return digest(sorted(image_ids))[:16]


def shard_name(shard: int) -> str:
    """Name of a shard's files, without extension."""
    return f"shard-{shard:05d}"


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by dotted name."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, part in value.items():
        leaves |= flatten(part, f"{name}.{key}" if name else key)
    return leaves


def compared(mine: Any, theirs: Any, here: str, there: str) -> str:
    """What two plans have as one entry; of digests, which say nothing to people, only whether there are any."""
    digests = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (mine, theirs))
    if digests and mine and theirs:
        return f"another one {here}"
    shown = [("one" if value else "none") if digests else shortened(value) for value in (mine, theirs)]
    return f"{shown[0]} {here}, {shown[1]} {there}"


def shortened(value: Any) -> str:
    """A value's JSON, cut after 40 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
