"""No network mixes devices, asks a GPU a question or uploads constants, in training and in evaluation.

A GPU refuses the first; for the others the host waits until the queued work is done. Everything runs without a GPU, see
helpers/fake_device.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.fork_server import run_python

PROGRAM = Path(__file__).with_name("device_program.py")
# Images come from the host, once per scale.
EVALUATION_UPLOADS = ["cpu to gpu in evaluation/inference.py:batch_logits"]
# The loss asks which classes occur, because it sorts all pixels once for each of them.
LOVASZ = "step of the loss lovasz"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.long)])
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What was found in each case, from a process of its own: the device stays registered for its whole life."""
    program = run_python(str(PROGRAM), request.param, cwd=tmp_path_factory.mktemp("device"))
    assert program.returncode == 0, program.stdout
    return json.loads(program.stdout.splitlines()[-1])


def select_cases(findings: dict[str, list[str]], kind: str) -> dict[str, list[str]]:
    chosen = {case: found for case, found in findings.items() if case.startswith(kind)}
    assert len(chosen) >= 2
    return chosen


def test_no_training_step_waits_for_the_device(findings: dict[str, list[str]]) -> None:
    """Of any network, term of the loss but one, and the moving average."""
    found_by_case = {case: found for case, found in select_cases(findings, "step").items() if found}
    (lovasz,) = found_by_case.pop(LOVASZ)
    assert "losses.py:lovasz" in lovasz
    assert found_by_case == {}


def test_what_surrounds_a_step_waits_for_nothing_and_sends_one_row_of_numbers_to_the_host(
    findings: dict[str, list[str]],
) -> None:
    """Wide labels, the guard against NaN with the sums over all ranks, clipping, and the values of the log."""
    assert findings["callbacks of a step"] == ["gpu to cpu in training/callbacks/nonfinite.py:copy_to_host"]


def test_an_evaluation_uploads_its_images_and_nothing_else(findings: dict[str, list[str]]) -> None:
    cases = select_cases(findings, "evaluation")
    assert {case: found for case, found in cases.items() if found != EVALUATION_UPLOADS} == {}


def test_no_decoder_on_any_encoder_waits_for_the_device(findings: dict[str, list[str]]) -> None:
    assert {case: found for case, found in select_cases(findings, "decoders").items() if found} == {}


@pytest.mark.reliability
def test_d11_no_network_and_no_loss_has_an_operation_that_deterministic_training_refuses(
    findings: dict[str, list[str]],
) -> None:
    """Of any ready model, any decoder on any encoder, and any term of the loss; tests/training has `lovasz`."""
    refused = {case: [one for one in found if one.startswith("refused")] for case, found in findings.items()}
    assert [case for case, found in refused.items() if found] == [
        "mistake: a pooling that has no deterministic gradient", "mistake: an operation that is never deterministic"
    ]  # fmt: skip


def test_no_network_loss_or_score_has_an_operation_that_apples_gpus_lack(findings: dict[str, list[str]]) -> None:
    """Neither float64 nor an operation without a kernel, by PyTorch's own table of operations."""
    problems = {case: found for case, found in select_cases(findings, "apple: ").items() if found}
    assert list(problems) == ["apple: mistake: a double", "apple: mistake: an operation without a kernel for Apple"]


def test_every_planted_mistake_is_found(findings: dict[str, list[str]]) -> None:
    mistakes = select_cases(findings, "mistake")
    assert [case for case, found in mistakes.items() if not found and not findings[f"apple: {case}"]] == []
