"""What TensorBoard shows of a run beside its curves: settings, charts of several curves, the text.

Each run writes its settings for the tab HParams, but not which columns that tab has. TensorBoard
then finds out what varies and shows that first, for any set of runs. Of several lists of columns it
would take an arbitrary one for all runs (`tensorboard/plugins/hparams/backend_context.py`); so runs
are not described by `SummaryWriter.add_hparams`, and a study's columns stand in a file that
TensorBoard does not read among other runs.

Settings are named as on the command line, without `init_args`: `model.net.kl_schedule.weight`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    NULL_TENSOR,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    create_summary_metadata,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from act_lightning.new_file import write_file
from act_lightning.settings import flatten

COLUMNS_FILE = "columns.hparams"
"""In a study's folder; `make tensorboard STUDY=...` gives it a name that TensorBoard reads."""
NO_SETTINGS = ("experiment", "run", "ckpt_path", "weights_only")
"""Where a run lies and how it was started: no settings of its training."""
SEED = "seed_everything"
TYPES = {"bool": DATA_TYPE_BOOL, "number": DATA_TYPE_FLOAT64, "string": DATA_TYPE_STRING}


def describe_run(
    writer: SummaryWriter, config: str, base: tuple[str, Mapping[str, Any]] | None
) -> None:
    """Writes a run's settings, the layout of its charts, and its configuration as text.

    Args:
        writer: of the run.
        config: its resolved configuration, YAML.
        base: name and content of the resolved configuration that it is compared with.
    """
    settings = yaml.safe_load(config)
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in shown_settings(settings).items():
        setattr(start.hparams[name], f"{_kind(value)}_value", value)
    _write(writer, SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))
    writer.add_custom_scalars(chart_layout(settings["rollout"]["executions"]))
    writer.add_text("config/all", f"```yaml\n{config}\n```", 0)
    if base is not None:
        writer.add_text("config/changed", changes_table(*base, settings), 0)
    writer.flush()


def finish_run(folder: Path, report: Mapping[str, Any] | None) -> None:
    """Writes how the run was graded, and that it ended.

    Args:
        folder: of the run.
        report: content of its results.json; None if it was not graded.
    """
    end = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
    with SummaryWriter(str(folder)) as writer:
        if report is not None:
            for name, summary in report["execution"].items():
                low, high = summary["wilson_95"]
                rates = {"rate": summary["success_rate"], "low": low, "high": high}
                for which, rate in rates.items():
                    writer.add_scalar(f"evaluation/{name}/success_{which}", rate, report["step"])
        _write(writer, SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def write_experiment(
    folder: Path, varying: Mapping[str, Sequence[Any]], metrics: Sequence[str]
) -> None:
    """Says which columns a study has in the tab HParams. Replaces what was said before.

    Args:
        folder: of the study; its runs lie below.
        varying: settings that vary, by dotted name, with their values.
        metrics: tags of scalars; TensorBoard shows the first five until others are chosen.
    """
    values: dict[str, list[Any]] = {SEED: []}
    for name, choices in varying.items():
        for choice in choices:
            for part, value in shown_settings({name: choice}).items():
                values.setdefault(part, []).append(value)
    experiment = Experiment(
        hparam_infos=[_column(name, choices) for name, choices in values.items()],
        metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in metrics],
    )
    summary = _summary(EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
    file = io.BytesIO()
    records = RecordWriter(file)
    for event in (Event(file_version="brain.Event:2"), Event(summary=summary)):
        records.write(event.SerializeToString())
    write_file(folder / COLUMNS_FILE, file.getvalue())


def shown_settings(settings: Mapping[str, Any]) -> dict[str, float | str | bool]:
    """Settings by dotted name, as TensorBoard knows them: numbers, booleans and strings.

    Lists are strings. What is null is left out: in a column of numbers a string breaks sorting.

    Args:
        settings: as in a configuration file.
    """
    return {
        name: value if isinstance(value, (bool, int, float, str)) else as_text(value)
        for name, value in _leaves(settings).items()
        if value is not None
    }


def as_text(value: Any) -> str:
    """A value as on the command line: `[top, left_wrist]`, `null`, `0.1`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def chart_layout(executions: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts of the tab Custom Scalars, as `SummaryWriter.add_custom_scalars` takes them.

    Args:
        executions: names of the ways of executing.
    """
    success = {
        name: ["Margin", [f"rollout/{name}/success_{which}" for which in ("rate", "low", "high")]]
        for name in executions
    }
    curves = {
        "L1": ["train/l1", "val/l1_prior", "val/l1_posterior", "val/l1_sampled"],
        "KL and active units": ["train/kl", "val/kl", "val/active_units"],
    }
    # Tags of lines are patterns, those of margins are not.
    lines = {name: ["Multiline", [f"^{tag}$" for tag in tags]] for name, tags in curves.items()}
    return {"Success, with its 95% interval": success, "Errors and latent": lines}


def changes_table(name: str, base: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A Markdown table of the settings that differ from those of `base`.

    Args:
        name: of the base.
        base: its settings.
        settings: of the run.
    """
    before, after = _leaves(base), _leaves(settings)
    rows = []
    for setting in sorted(before | after):
        old, new = (
            f"`{as_text(side[setting])}`" if setting in side else "" for side in (before, after)
        )
        if old != new:
            rows.append(f"| {setting} | {old} | {new} |")
    if not rows:
        return f"Nothing differs from {name}."
    return "\n".join([f"| setting | {name} | this run |", "| --- | --- | --- |", *rows])


def _column(name: str, values: Sequence[float | str | bool]) -> HParamInfo:
    """A column of the tab HParams. Without values its numbers are not known beforehand."""
    column = HParamInfo(name=name, differs=True, type=DATA_TYPE_FLOAT64)
    if values:
        kinds = {_kind(value) for value in values}
        column.type = TYPES[kinds.pop()] if len(kinds) == 1 else DATA_TYPE_STRING
        column.domain_discrete.extend(dict.fromkeys(values))
    return column


def _kind(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return "bool"
    return "string" if isinstance(value, str) else "number"


def _write(writer: SummaryWriter, tag: str, data: HParamsPluginData) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(_summary(tag, data))


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    value = Summary.Value(tag=tag, metadata=create_summary_metadata(data), tensor=NULL_TENSOR)
    return Summary(value=[value])


def _leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the training by dotted name, without `init_args`."""
    return {
        name.replace(".init_args.", "."): value
        for name, value in flatten(settings).items()
        if name not in NO_SETTINGS
    }
