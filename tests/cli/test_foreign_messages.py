"""Messages of libraries that nobody needs are hidden, and no others."""

from __future__ import annotations

import logging
import warnings

import pytest

from semseg.cli.foreign_messages import HIDDEN_WARNINGS, QUIET_LOGGERS, hide_foreign_messages

# As Lightning and PyTorch write them.
HIDDEN = [
    "This DataLoader will create 4 worker processes in total. Our suggested max number of worker in current system",
    "The 'train_dataloader' does not have many workers which may be a bottleneck. Consider increasing the value of the",
    "Consider setting `persistent_workers=True` in 'val_dataloader' to speed up the dataloader worker initialization.",
    "The number of training batches (12) is smaller than the logging interval Trainer(log_every_n_steps=20).",
    "Checkpoint directory /home/someone/runs/a b/checkpoints exists and is not empty.",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    "GPU available but not used. You can set it by doing `Trainer(accelerator='gpu')`.",
    "Found 12 module(s) in eval mode at the start of training. This may lead to unexpected behavior during training.",
    "It is recommended to use `self.log('val/miou', ..., sync_dist=True)` when logging on epoch level",
    "It is recommended to use `self.log('test/overall', ..., sync_dist=True)` when logging on epoch level",
]
SHOWN = [
    "3 of 11 classes did not occur in this epoch: water, window, sun.",
    "You passed `Trainer(accelerator='cpu', precision='16-mixed')` but AMP with fp16 is not supported on CPU.",
    "It is recommended to use `self.log('loss', ..., sync_dist=True)` when logging on epoch level",
    "has been waiting for a.jpg for 60 s. Is the disk slow?",
]


def test_each_of_these_warnings_is_hidden_and_no_other() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_foreign_messages()
        for message in [*HIDDEN, *SHOWN]:
            warnings.warn(message, stacklevel=1)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning, stacklevel=1)
        warnings.warn(HIDDEN[0], RuntimeWarning, stacklevel=1)  # another category
    assert [str(warning.message) for warning in caught] == [*SHOWN, HIDDEN[0]]
    assert len(HIDDEN) >= len(HIDDEN_WARNINGS) - 1  # an example of each


def test_loggers_of_libraries_keep_their_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # whatever other tests have configured
    for name in QUIET_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        logging.getLogger(name).setLevel(logging.NOTSET)  # forgets what it has answered so far
    hide_foreign_messages()
    for name in QUIET_LOGGERS:
        logger = logging.getLogger(name)
        assert logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)
