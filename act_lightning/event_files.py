"""A run's TensorBoard files when it goes on from a checkpoint: without what is logged once more.

A run that was killed has logged steps that its last checkpoint does not know. They are taken again,
and would stand twice in its event files: TensorBoard can be told to hide the first of them, other
readers cannot. So they are taken out, as is a last record of which only a part was written.
"""

from __future__ import annotations

import io
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from act_lightning.new_file import write_file


def cut_events(folder: Path, step: int, *, owes_validation: bool) -> None:
    """Takes out of the event files what a resumed run logs once more.

    That is what was logged after the checkpoint, how the run was graded, and its settings.

    Args:
        folder: of the run.
        step: optimizer steps taken at the checkpoint; 0 if there is none.
        owes_validation: whether the validation of that step is still to come.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = io.BytesIO()
        records = RecordWriter(content)
        for record in RawEventFileLoader(str(path)).Load():
            if _stays(Event.FromString(record), step, owes_validation):
                records.write(record)
        if len(content.getvalue()) != path.stat().st_size:
            write_file(path, content.getvalue())


def _stays(event: Event, step: int, owes_validation: bool) -> bool:
    tags = [value.tag for value in event.summary.value]
    if not tags:  # the file's version
        return True
    if not 0 < event.step <= step or any(tag.startswith("evaluation/") for tag in tags):
        return False
    # Training logs a step before it is validated.
    return event.step < step or not owes_validation or all(t.startswith("train/") for t in tags)
