"""One training step under Lightning's DDP on two processes equals the step of one process on both images."""

from __future__ import annotations

import pytest
import torch

from semseg.syncbn.layer import CONVENTIONS, convert_batch_norms


@pytest.mark.slow
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", ["small", "resnet18_dilated8 + c1"])
def test_two_processes_take_the_step_of_one(name: str, convention: str) -> None:
    from lightning_ranks import NETS, Task, fit, under_ddp

    task = Task(NETS[name]())
    start = {key: value.clone() for key, value in task.net.state_dict().items()}
    if convention == "published":  # Lightning calls no LayerSync with one device
        convert_batch_norms(task.net, convention)
    fit(task, 1, convention)
    expected = task.net.state_dict()
    assert any(not torch.equal(value, expected[key]) for key, value in start.items())
    for rank in under_ddp():
        state = rank[f"{name}, {convention}"]["state"]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-10)
