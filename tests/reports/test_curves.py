from __future__ import annotations

from pathlib import Path

from semseg.reports.charts import Line, Mark
from semseg.reports.curves import Curves, read_training_curves, run_folder_of_checkpoint


def log(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def test_the_log_of_a_resumed_run_replaces_repeated_steps(tmp_path: Path) -> None:
    log(tmp_path / "logs/version_9", "epoch,step,train/loss,val/miou\n0,10,3.0,\n0,20,2.0,\n0,20,,0.5\n0,30,9.0,\n")
    log(tmp_path / "logs/version_10", "epoch,step,train/loss\n1,30,1.5\n1,40,1.0\n")
    loss, miou = read_training_curves(tmp_path)
    best = Mark(20, "best validation: mean IoU 50.00 %, epoch 1, step 20")
    assert loss == Curves("loss", (Line("train/loss", (10, 20, 30, 40), (3.0, 2.0, 1.5, 1.0)),), best, 40)
    assert miou == Curves("mean IoU", (Line("val/miou", (20,), (0.5,), has_dots=True),), best, 40)


def test_the_best_validation_is_the_first_with_the_highest_mean_iou(tmp_path: Path) -> None:
    log(tmp_path / "logs", "step,epoch,train/loss,val/miou\n4,0,1,0.1\n9,1,1,0.6\n14,2,1,0.6\n19,3,1,0.3\n")
    for curves in read_training_curves(tmp_path):
        assert curves.best is not None and curves.best.x == 9 and "epoch 2" in curves.best.name


def test_the_best_validation_is_that_of_the_monitored_score(tmp_path: Path) -> None:
    log(tmp_path / "logs", "step,epoch,val/miou,val/distance\n4,0,0.1,7\n9,1,0.6,9\n")
    curves = read_training_curves(tmp_path, monitor="val/distance", mode="min")
    assert [one.title for one in curves] == ["mean IoU", "distance"]
    assert curves[0].best is not None and curves[0].best.x == 4 and "val/distance 7" in curves[0].best.name


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


def test_every_score_that_a_program_adds_has_a_chart_of_its_own(tmp_path: Path) -> None:
    log(tmp_path / "logs", "step,epoch,val/kappa,val/miou,val/outlines,val/overall\n4,0,0.1,0.2,7.5,0.3\n")
    charts = read_training_curves(tmp_path)
    assert [curves.title for curves in charts] == ["mean IoU", "kappa", "outlines"]
    assert charts[2].lines == (Line("val/outlines", (4,), (7.5,), has_dots=True),)
