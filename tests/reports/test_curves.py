from __future__ import annotations

from pathlib import Path

from semseg.reports.charts import Line
from semseg.reports.curves import Curves, read_training_curves, run_folder_of_checkpoint


def log(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def test_the_log_of_a_resumed_run_replaces_repeated_steps(tmp_path: Path) -> None:
    log(tmp_path / "logs/version_9", "epoch,step,train/loss,val/miou\n0,10,3.0,\n0,20,2.0,\n0,20,,0.5\n0,30,9.0,\n")
    log(tmp_path / "logs/version_10", "epoch,step,train/loss\n1,30,1.5\n1,40,1.0\n")
    loss, miou = read_training_curves(tmp_path)
    assert loss == Curves("loss", (Line("train/loss", (10, 20, 30, 40), (3.0, 2.0, 1.5, 1.0)),))
    assert miou == Curves("mean IoU", (Line("val/miou", (20,), (0.5,)),))


def test_equal_learning_rates_are_one_line_and_nan_is_left_out(tmp_path: Path) -> None:
    log(tmp_path / "logs/csv", "step,lr-SGD/decoder,lr-SGD/encoder,train/loss\n1,0.1,0.1,nan\n2,0.05,0.05,2\n")
    loss, rate = read_training_curves(tmp_path)
    assert loss.lines[0].y == (2.0,)
    assert [line.name for line in rate.lines] == ["lr-SGD/decoder"]


def test_a_curve_that_the_resumed_run_did_not_log_is_removed(tmp_path: Path) -> None:
    log(tmp_path / "logs/version_0", "step,train/loss,val/miou\n5,2.0,0.5\n")
    log(tmp_path / "logs/version_1", "step,train/loss\n5,1.0\n")
    assert [curves.title for curves in read_training_curves(tmp_path)] == ["loss"]


def test_a_folder_without_logs_has_no_curves(tmp_path: Path) -> None:
    assert read_training_curves(tmp_path) == ()


def test_the_run_folder_of_a_checkpoint_is_two_levels_up() -> None:
    assert run_folder_of_checkpoint("/runs/a/checkpoints/best.ckpt") == Path("/runs/a")
