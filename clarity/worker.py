"""What runs in the workers of a job: read, explain and write one shard, each stage a counted attempt.

A table of one row passes from stage to stage: the shard's number, a note in JSON on how it went, and tables as bytes,
which are not copied. Readers and writers of their own are small processes: torch is loaded by ``ExplainShard`` alone.
Does not know Ray.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clarity import data, storage
from clarity.audit.commits import GivenUp, begin_attempt, commit_shard, is_committed, scratch_directory
from clarity.audit.plan import Plan
from clarity.images import Preprocessing, encode_png_column
from clarity.schema import PREDICTOR_IMAGE

if TYPE_CHECKING:
    from clarity.explainer import Explainer


@dataclass(frozen=True)
class Work:
    """What every worker of a run is given."""

    uri: str  # of the audit
    run: str  # name of the run
    plan: Plan
    dataset: data.Dataset
    preprocessing: Preprocessing  # of the model
    predictor_preprocessing: Preprocessing | None = None  # None where the plan has no predictor
    predictor: str | None = None  # an ONNX file or module:function


def shard_item(plan: Plan, shard: int, listing: pa.Table) -> dict[str, Any]:
    """Input of ``read_shard``: the shard's number and its part of the listing, compressed as the driver holds all."""
    span = plan.shards[shard]
    part = listing[span["start"] : span["stop"]].combine_chunks()
    return {"shard": shard, "note": "{}", "listing": pack(part, compression="zstd").to_pybytes()}


def read_shard(batch: pa.Table, work: Work) -> pa.Table:
    """First stage: the shard's part of the listing in, its images out."""
    row = unpack_row(batch)

    def read() -> dict[str, Any]:
        start = time.perf_counter()
        listing = unpack(row["listing"])
        images = data.read_images(work.dataset, listing, work.preprocessing)
        if work.predictor_preprocessing not in (None, work.preprocessing):
            images = add_images(images, data.read_images(work.dataset, listing, work.predictor_preprocessing))
        seconds = {"read": time.perf_counter() - start}
        note = {"seconds": seconds, "clipped": data.clipped_of(images)}
        return {"note": note, "images": pack(images)}

    return attempted(work, row, "read", read, ("images",))


def add_images(images: pa.Table, others: pa.Table) -> pa.Table:
    """Images with the predictor's version of each as a further column; null, with the reason, where either is."""
    readable = pc.and_(images["image"].is_valid(), others["image"].is_valid())
    image = pc.if_else(readable, images["image"], pa.scalar(None, images["image"].type))
    images = images.set_column(images.column_names.index("image"), images.schema.field("image"), image)
    error = pc.coalesce(images["error"], others["error"])
    images = images.set_column(images.column_names.index("error"), images.schema.field("error"), error)
    return images.append_column(PREDICTOR_IMAGE, others["image"])


def write_shard(batch: pa.Table, work: Work) -> pa.Table:
    """Last stage: encode the images, write and commit the files; shard and note go back to the driver."""
    row = unpack_row(batch)

    def write() -> dict[str, Any]:
        plan, note, start = work.plan, row["note"], time.perf_counter()
        codes = encode_png_column(unpack(row["codes"]), "x", plan.image_shape)
        pairs = encode_png_column(unpack(row["counterfactuals"]), "x_cf", plan.image_shape)
        tables = {
            "codes": codes.cast(plan.codes_schema()),
            "counterfactuals": pairs.cast(plan.counterfactuals_schema()),
        }
        if row["traces"] is not None:
            tables["traces"] = unpack(row["traces"])
        encoded = time.perf_counter()
        seconds = note["seconds"] | {"pictures": encoded - start}
        scratch = scratch_directory(work.uri, work.run)
        commit_shard(work.uri, plan, row["shard"], tables, note | {"seconds": seconds}, scratch=scratch)
        return {"note": note | {"seconds": seconds | {"write": time.perf_counter() - encoded}}}

    return attempted(work, row, "write", write, ())


def attempted(
    work: Work, row: Mapping[str, Any], stage: str, action: Callable[[], dict[str, Any]], names: Sequence[str]
) -> pa.Table:
    """Run a stage of a shard as a counted attempt, unless an earlier one failed, whose note is passed on.

    No exception leaves it: the note says what failed.
    """
    shard, nothing = row["shard"], dict.fromkeys(names)
    if row["note"].keys() & {"error", "committed"}:
        return pack_row(shard, row["note"], nothing)
    try:
        again = begin_attempt(work.uri, work.run, shard, stage) > 1
        # After the loss of a machine Ray also repeats stages that had succeeded.
        if again and is_committed(work.uri, work.plan.fingerprint, shard):
            return pack_row(shard, {"committed": True}, nothing)
        result = action()
        return pack_row(shard, result["note"], {name: result[name] for name in names})
    except GivenUp as error:
        return pack_row(shard, {"stage": stage, "error": str(error), "given_up": True}, nothing)
    except (KeyboardInterrupt, SystemExit):  # of the process, which Ray replaces
        raise
    except BaseException as error:  # even a panic of a Rust library, so that the other shards go on
        if type(error).__name__ == "AcceleratorError":
            # torch's, after which a GPU computes nothing more in this process: Ray replaces that, too.
            raise SystemExit(str(error)) from error
        return pack_row(shard, {"stage": stage, "error": f"{type(error).__name__}: {error}"}, nothing)


def pack_row(shard: int, note: dict[str, Any], parts: Mapping[str, pa.Buffer | None]) -> pa.Table:
    """A table of one row that wraps buffers without copying them."""
    columns: dict[str, pa.Array] = {"shard": pa.array([shard]), "note": pa.array([json.dumps(note)])}
    for name, part in parts.items():
        if part is None:
            columns[name] = pa.nulls(1, pa.large_binary())
        else:
            ends = pa.py_buffer(np.array([0, part.size], np.int64))
            columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, part])
    return pa.table(columns)


def unpack_row(batch: pa.Table) -> dict[str, Any]:
    """The inverse of ``pack_row``."""
    parts = {name: batch[name][0].as_buffer() for name in batch.column_names if name not in ("shard", "note")}
    return {"shard": batch["shard"][0].as_py(), "note": json.loads(batch["note"][0].as_py()), **parts}


def pack(table: pa.Table, compression: str | None = None) -> pa.Buffer:
    """A table as bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpack(buffer: pa.Buffer) -> pa.Table:
    """The inverse of ``pack``; a view of what was not compressed."""
    return pa.ipc.open_stream(buffer).read_all()


class ExplainShard:
    """Second stage: images in, tables out; keeps the model from shard to shard.

    ``then`` is the last stage, where it runs in this process, too.
    """

    def __init__(self, work: Work, then: Callable[[pa.Table, Work], pa.Table] | None = None, **options: Any) -> None:
        self.work, self.then, self.options = work, then, options
        gc.set_threshold(100_000, 50)  # else a sixth of torch's import goes into looking for garbage

    @cached_property
    def explainer(self) -> Explainer:
        """The explainer of the plan, made at the first shard."""
        from clarity.explainer import explainer_of
        from clarity.model import load_model

        # Made within an attempt rather than with the worker, so that a model that cannot be loaded, or kills the
        # process, counts as a failure of the shard instead of being retried for ever.
        plan = self.work.plan
        model = load_model(storage.join(self.work.uri, "model"))
        sums = {name: about["sha256"] for name, about in model.card.get("files", {}).items()}
        if model.fingerprint != plan.model["fingerprint"] or not plan.model["sums"].items() <= sums.items():
            raise ValueError(
                f"expected the model of the plan in {storage.display(self.work.uri)}/model, found another: restore it"
            )
        return explainer_of(plan, model, self.work.predictor, **self.options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain one shard, and end it where there is a last stage."""
        row = unpack_row(batch)
        names = ("codes", "counterfactuals", "traces")

        def run() -> dict[str, Any]:
            plan = self.work.plan
            trace = plan.trace - plan.shards[row["shard"]]["start"]
            explained = self.explainer.search_shard(unpack(row["images"]), max(0, trace))
            explained.stats["seconds"] |= row["note"]["seconds"]
            if row["note"].get("clipped"):
                explained.stats["clipped"] = row["note"]["clipped"]
            tables = (explained.codes, explained.counterfactuals, explained.traces)
            packed = {name: None if table is None else pack(table) for name, table in zip(names, tables)}
            return {"note": explained.stats, **packed}

        explained = attempted(self.work, row, "explain", run, names)
        return explained if self.then is None else self.then(explained, self.work)


def explain_here(items: Sequence[dict[str, Any]], work: Work, **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads, explains and writes shards in this process, one after the other; gives each with its note."""
    explain = ExplainShard(work, write_shard, **options)
    for item in items:
        row = unpack_row(explain(read_shard(pa.Table.from_pylist([item]), work)))
        yield row["shard"], row["note"]
