"""Packs the page's pictures into few image files: sheets of equal tiles, equal pictures once."""

import base64
import io
import math

import numpy as np
from PIL import Image

MAX_SIDE = 96


class Tiles:
    """Pictures of one size in sheets, those above MAX_SIDE reduced, known by their index; -1 is a missing one."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.channels, height, width = image_shape
        scale = min(1.0, MAX_SIDE / max(height, width))
        self.height, self.width = max(1, round(height * scale)), max(1, round(width * scale))
        self.columns, self.rows = max(1, 1024 // self.width), max(1, 1024 // self.height)
        self.indices: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, picture: np.ndarray | None) -> int:
        """The index of a picture (C, H, W), uint8 or float in [0, 1]."""
        if picture is None:
            return -1
        if picture.dtype != np.uint8:
            picture = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        if picture.shape[1:] != (self.height, self.width):
            image = Image.fromarray(picture[0] if self.channels == 1 else picture.transpose(1, 2, 0))
            reduced = np.asarray(image.resize((self.width, self.height), Image.Resampling.LANCZOS))
            picture = reduced[None] if self.channels == 1 else reduced.transpose(2, 0, 1)
        return self.indices.setdefault(np.ascontiguousarray(picture).tobytes(), len(self.indices))

    def add_change(self, change: np.ndarray) -> int:
        """The index of a change (C, H, W) in [-1, 1], channels averaged: grey for none, brighter for more."""
        grey = 0.5 + 0.5 * np.clip(change.mean(0, keepdims=True), -1, 1)
        return self.add(np.repeat(grey, len(change), 0))

    def width_at(self, height: float) -> int:
        """Width at which a tile is about ``height`` high; a whole multiple of its own where it is smaller."""
        scale = height / self.height
        return round(self.width * (math.ceil(scale - 0.25) if scale > 1 else scale))

    def layout(self) -> dict[str, int]:
        """Size of a tile in pixels, and the columns and rows of a sheet."""
        return {"width": self.width, "height": self.height, "columns": self.columns, "rows": self.rows}

    def sheets(self) -> list[str]:
        """Every sheet as a data URI: grey pictures exactly, colour ones with invisible losses."""
        pictures, size = list(self.indices), self.columns * self.rows
        sheets = []
        for first in range(0, len(pictures), size):
            part = pictures[first : first + size]
            lines = math.ceil(len(part) / self.columns)
            tiles = np.zeros((lines * self.columns, self.channels, self.height, self.width), np.uint8)
            tiles[: len(part)] = np.frombuffer(b"".join(part), np.uint8).reshape(len(part), *tiles.shape[1:])
            sheet = tiles.reshape(lines, self.columns, *tiles.shape[1:]).transpose(0, 3, 1, 4, 2)
            sheet = sheet.reshape(lines * self.height, self.columns * self.width, self.channels)
            image = Image.fromarray(sheet[:, :, 0] if self.channels == 1 else sheet).convert("RGB")
            buffer = io.BytesIO()
            # The quality of exact pictures is the effort: 30 takes twice as long for 7 % fewer bytes.
            exact = {"lossless": True, "quality": 0, "method": 1}
            image.save(buffer, "WEBP", **(exact if self.channels == 1 else {"quality": 85, "method": 3}))
            sheets.append("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode())
        return sheets
