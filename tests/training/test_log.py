"""The log times each step without the work before it."""

import json
import os
from pathlib import Path

import pytest
from golden_models import backbone

from para_jax import make_mesh
from para_jax.config import SITES, load_config
from para_jax.estimate.topology import CHIP_GIB
from para_jax.io.progress import Progress
from para_jax.runtime import devices
from para_jax.runtime.devices import matrix_weights, peak_rate
from para_jax.training import log
from para_jax.training.log import TIMES, Done, Log

VALUES = {"loss": 2.0, "grad_norm": 1.0}


def opened(folder, peak_rate=None, every=1):
    config = load_config(None, ["logging.report_to=[]", f"logging.every={every}"])
    return Log(config, folder, peak_rate=peak_rate)


def written(folder, steps, clock, monkeypatch, **options):
    """The rows of a log whose steps are read at these seconds."""
    made, times = opened(folder, **options), iter(clock)
    monkeypatch.setattr(log.time, "monotonic", lambda: next(times))
    for done in steps:
        made.step(done, VALUES, Progress("training"))
    made.flush()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_timed_from_its_start_or_the_end_of_the_step_before(tmp_path, monkeypatch):
    steps = [
        Done(1, {}, 100, begun=10.0, waited=0.5),  # the device was idle
        Done(2, {}, 60, begun=10.6, waited=0.1),  # dispatched while step 1 ran until 12
        Done(3, {}, 80, begun=20.0, waited=0.0),  # after an evaluation
    ]
    rows = written(tmp_path, steps, [12.0, 15.0, 24.0], monkeypatch)
    assert [row["step_seconds"] for row in rows] == [2.0, 3.0, 4.0]
    assert [row["tokens_per_second"] for row in rows] == [50.0, 20.0, 20.0]
    assert [row["input_wait_seconds"] for row in rows] == [0.5, 0.1, 0.0]
    assert all("model_flops_utilisation" not in row for row in rows)  # the peak is not known


def test_a_step_that_compiled_has_no_rate(tmp_path, monkeypatch):
    rows = written(tmp_path, [Done(1, {}, 100, begun=None, waited=0.0)], [12.0], monkeypatch, peak_rate=100.0)
    assert rows == [{"step": 1} | VALUES]


def test_utilisation_is_the_rate_over_the_peak_rate(tmp_path, monkeypatch):
    rows = written(tmp_path, [Done(1, {}, 100, begun=10.0, waited=0.0)], [12.0], monkeypatch, peak_rate=200.0)
    assert rows[0]["model_flops_utilisation"] == 0.25
    assert set(TIMES) <= set(rows[0])


def test_every_nth_step_is_written(tmp_path, monkeypatch):
    steps = [Done(i, {}, 8, begun=float(i), waited=0.0) for i in (1, 2, 3, 4)]
    rows = written(tmp_path, steps, [2.0, 3.0, 4.0, 5.0], monkeypatch, every=2)
    assert [row["step"] for row in rows] == [2, 4]


def test_a_full_disk_is_one_line_and_does_not_hang():
    made = opened(Path("/nowhere"))
    made.rows.file = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        made.write(1, VALUES, show=True)


def test_tensorboard_on_a_full_disk_raises_in_the_run_and_closes_quietly(tmp_path, monkeypatch, capfd):
    board = log.TensorBoard(load_config(None), tmp_path, 0)
    full = open("/dev/full", "wb")
    monkeypatch.setattr(board.events._py_recordio_writer, "_writer", full)
    monkeypatch.setattr(log, "FLUSH_SECONDS", 0)
    with pytest.raises(OSError, match="No space left"):
        board(1, VALUES)
    board.close()
    assert capfd.readouterr().err == ""
    with open("/dev/null", "wb") as nowhere:
        os.dup2(nowhere.fileno(), full.fileno())  # what its buffer still holds is let go quietly
    full.close()


def test_tensorboard_knows_from_which_step_a_run_resumes(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    board = log.TensorBoard(load_config(None), tmp_path, 4)
    board(5, {"loss": 2.0})
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events] == [0, 5, 5]
    assert events[1].session_log.status == SessionLog.START
    assert (events[2].summary.value[0].tag, events[2].summary.value[0].simple_value) == ("loss", 2.0)


# ---------------------------------------------------------------------------------------------------------- utilisation


def test_the_peaks_are_found_by_the_device_kind():
    # the device_kind that libtpu 0.0.3x gives each slice, and the peaks' order by generation
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert set(kinds) == set(CHIP_GIB)
    peaks = {name: devices.PEAK_FLOPS[kind] for name, kind in kinds.items()}
    assert sorted(peaks, key=peaks.__getitem__) == ["v5e", "v4", "v5p", "v6e"]
    for one, other in (("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")):
        assert devices.PEAK_FLOPS[one] == devices.PEAK_FLOPS[other]
    # a cluster's tensor cores: clock x units x FLOPs a cycle, from NVIDIA's architecture white papers
    assert devices.PEAK_FLOPS["NVIDIA A100-SXM4-80GB"] == pytest.approx(1.41e9 * 108 * 4 * 512, rel=2e-3)
    assert devices.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == pytest.approx(1.83e9 * 132 * 4 * 1024, rel=2e-3)
    assert devices.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == devices.PEAK_FLOPS["NVIDIA H200"]
    assert all(1e14 < peak < 1e16 for peak in devices.PEAK_FLOPS.values())


def test_the_peak_rate_is_four_flops_per_weight_on_every_device(monkeypatch):
    model = backbone("llama")
    weights = sum(
        getattr(part, site).kernel[...].size
        for layer in model.layers
        for part in (layer.attention, layer.feedforward)
        for site in SITES
        if hasattr(part, site)
    )
    assert weights == matrix_weights(model.config) > 50_000
    assert (
        peak_rate(model.config, make_mesh(2, 2, 1).devices.flatten()) is None
    )  # what a CPU can do is not in the table
    monkeypatch.setitem(devices.PEAK_FLOPS, "cpu", 1e12)
    assert peak_rate(model.config, make_mesh(2, 2, 1).devices.flatten()) == pytest.approx(4 * 1e12 / (4 * weights))
