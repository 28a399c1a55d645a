"""Results of slow steps, kept beside the comparison and read again while what they depend on stays the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clarity import storage
from clarity.audit.commits import to_parquet


@dataclass(frozen=True)
class Cache:
    """Files below ``out``; each remembers the key of what it depends on."""

    out: str

    def path(self, *parts: str) -> str:
        """A path below ``out``."""
        return storage.join(self.out, *parts)

    def json(self, name: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of ``name``, made anew unless the file has this key."""
        if storage.exists(self.path(name)):
            kept = storage.read_json(self.path(name))
            if kept.get("key") == key:
                return dict(kept)
        made = {"key": key, **make()}
        storage.write_json(self.path(name), made)
        return made

    def table(self, name: str, key: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table ``name``, made anew unless the file has this key."""
        if storage.exists(self.path(name)):
            kept = pq.read_table(pa.BufferReader(storage.read_bytes(self.path(name))))
            if (kept.schema.metadata or {}).get(b"clarity.key") == key.encode():
                return kept.replace_schema_metadata(None)
        made = make()
        storage.write_bytes(self.path(name), to_parquet(made.replace_schema_metadata({"clarity.key": key})))
        return made


def key_of(*depends: Any) -> str:
    """SHA-256 of what a result depends on."""
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
