"""The real command line, and a run of it that takes seconds."""

from __future__ import annotations

from semseg.launch import CONFIG_DIR

RUN = CONFIG_DIR.parent / "run.py"
TINY = [
    "data=scenes", "data.make.num_train=6", "data.make.num_val=7", "data.root=scenes", "data.batch_size=1",
    "data.short_edges=[32]", "data.max_long_edge=64", "data.num_workers=0", "data.steps_per_epoch=2",
    "model/encoder=resnet18", "model/decoder=c1", "eval.scales=[32]", "trainer.accelerator=cpu", "trainer.max_epochs=1",
]  # fmt: skip
