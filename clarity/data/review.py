"""What a user should know of a data set before a model is trained on it, a line each."""

import pyarrow as pa
import pyarrow.compute as pc

from clarity.data.listing import left_out, notes, some
from clarity.report.text import counted

#: Below this many held-out images an accuracy is little more than a guess.
FEW_IMAGES = 50


def review(listing: pa.Table, held_out: pa.Table | None) -> list[str]:
    """What is dropped or doubtful in the images to train on, and in those held out to measure on, if any."""
    lines = [f"left out: {counted(count, reason)}" for reason, count in left_out(listing).items()]
    lines += [f"note: {note}" for note in notes(listing)]
    counts = count_labels(listing)
    if single := [name for name, count in counts.items() if count == 1]:
        lines.append(f"note: one image only of {some(single)}: add images, or leave the class out")
    if held_out is None:
        return lines
    others = {reason: count for reason, count in left_out(held_out).items() if reason not in left_out(listing)}
    lines += [f"left out of the held-out images: {counted(count, reason)}" for reason, count in others.items()]
    lines += [f"note on the held-out images: {note}" for note in notes(held_out) if note not in notes(listing)]
    measured = count_labels(held_out)
    if counts and not measured:
        return [*lines, "note: no held-out image has a label: accuracies stay unknown; hold out a split with labels"]
    if unseen := [name for name in counts if name not in measured]:
        lines.append(
            f"note: no held-out image of {some(unseen)}: its accuracy stays unknown; add images of it to the held-out "
            "split"
        )
    if strange := [name for name in measured if name not in counts]:
        lines.append(f"note: no image to train on of {some(strange)}, which is only among the held-out images")
    if (labelled := sum(measured.values())) < FEW_IMAGES:
        images = counted(labelled, "held-out images")
        lines.append(f"note: {images} with a label only: accuracies measured on them are rough")
    return lines


def count_labels(listing: pa.Table) -> dict[str, int]:
    """How many images each class has, in the order of the names."""
    counts = pc.value_counts(listing["label_name"].drop_null())
    return dict(sorted((entry["values"], entry["counts"]) for entry in counts.to_pylist()))
