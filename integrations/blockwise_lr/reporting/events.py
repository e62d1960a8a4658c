"""TensorBoard's event files, through TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from ..blocks import BlockError
from .runs import Records

_TEXT = "/text_summary"  # what add_text appends to a name


def is_events(path: Path) -> bool:
    return ".tfevents." in path.name


def read_events(files: list[Path]) -> Records:
    """The scalars of event files of one run, oldest first, and texts (Megatron writes its arguments so).

    Raises:
        BlockError: a file is no event file.
        ImportError: tensorboard is not installed.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = Records()
    for file in sorted(files, key=lambda path: path.name):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        try:
            events.Reload()
        except Exception as error:  # the reader's errors have no common class
            raise BlockError(f"{file} cannot be read as TensorBoard events ({error})") from None
        tags = events.Tags()
        for tag in tags["scalars"]:
            if tag.endswith(" vs samples"):
                continue
            scalars = events.Scalars(tag)
            if tag.endswith("validation"):  # Megatron evaluates once more on other batches when training has ended
                scalars = list({event.step: event for event in reversed(scalars)}.values())
            for event in scalars:
                records.add(tag, event.step, event.value, event.wall_time)
        for tag in tags["tensors"]:
            _read_tensor(records, tag, events.Tensors(tag))
        records.files.append(str(file))
    return records


def _read_tensor(records: Records, tag: str, events: list) -> None:
    """A text, or scalars as TensorFlow 2 writes them."""
    from tensorboard.util.tensor_util import make_ndarray

    if tag.endswith(_TEXT):
        name, value = tag.removesuffix(_TEXT), make_ndarray(events[-1].tensor_proto).ravel()
        text = " ".join(part.decode(errors="replace") for part in value)
        records.fact("settings", name, text)
        if name == "seed":
            records.seed = text
        return
    for event in events:
        value = make_ndarray(event.tensor_proto)
        if value.size == 1 and value.dtype.kind in "fiu":
            records.add(tag, event.step, float(value.item()), event.wall_time)
