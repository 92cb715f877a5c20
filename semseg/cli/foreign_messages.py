"""Messages of libraries that need no action of ours or of the user, each hidden by itself. All others are shown."""

from __future__ import annotations

import logging
import warnings

# Loggers of Lightning whose remarks are hidden; their warnings stay.
QUIET_LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",  # hardware, tensor cores, other products, defaults
    "lightning_fabric.utilities.rank_zero",
    "lightning_fabric.utilities.distributed",  # ranks that connect
    "pytorch_lightning.trainer.connectors.checkpoint_connector",  # restored files: a resumed run says it itself
)
# Category, beginning (a regular expression), and why nobody needs it.
HIDDEN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r".*LeafSpec"),  # Lightning's use of a function of torch that changes
    (UserWarning, r"Found \d+ module\(s\) in eval mode"),  # model.freeze_bn, model.encoder.frozen
    (UserWarning, r"It is recommended to use `self\.log\('(val|test)/"),  # scores are equal on all ranks already
    (UserWarning, r"This DataLoader will create \d+ worker processes"),  # a number that the user has given
    (UserWarning, r"The '\w+' does not have many workers"),  # the same
    (UserWarning, r"Consider setting `persistent_workers=True`"),  # the loader of training keeps its workers
    (UserWarning, r"The number of training batches \(\d+\) is smaller than the logging"),  # epochs end with a row
    (UserWarning, r"Checkpoint directory .* exists and is not empty"),  # a resumed run
    (UserWarning, r"Be aware that when using `ckpt_path`, callbacks used to create"),  # removed to continue the run
    (UserWarning, r"GPU available but not used"),  # trainer=cpu
)


def hide_foreign_messages() -> None:
    """Hide these messages from now on, in this process."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for category, pattern in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)
