"""Tables of slow steps, kept beside the comparison and read again while what they depend on stays the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clarity import storage
from clarity.audit.commits import to_parquet


def cached(uri: str, key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table in ``uri``, made anew unless the file has this key."""
    if storage.exists(uri):
        kept = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        if (kept.schema.metadata or {}).get(b"clarity.key") == key.encode():
            return kept.replace_schema_metadata(None)
    made = make()
    storage.write_bytes(uri, to_parquet(made.replace_schema_metadata({"clarity.key": key})))
    return made


def key_of(*depends: Any) -> str:
    """SHA-256 of what a result depends on."""
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
