"""The benchmark of answers in time: the same arrivals for all, a clock that counts work, and honest rows."""

from __future__ import annotations

import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.bench.slo import ANYTIME, FIXED, POLICIES, REQUEST, Jumping, SloBench


class CountedWork:
    """A clock that moves with the patches that a pipeline evaluates, a thousand to the second."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        evaluate = pipeline.denoiser.evaluate

        def counted(evaluations: list[object]) -> object:
            self.now += sum(pipeline.denoiser.patches(each.plan) for each in evaluations) / 1000  # type: ignore[attr-defined]
            return evaluate(evaluations)  # type: ignore[arg-type]

        monkeypatch.setattr(pipeline.denoiser, "evaluate", counted)

    def __call__(self) -> float:
        return self.now


def test_the_clock_jumps_forward_and_never_back() -> None:
    clock = Jumping(lambda: 1.0, 1.0)
    clock.jump_to(5.0)
    assert clock() == 5.0
    clock.jump_to(3.0)
    assert clock() == 5.0


def test_every_policy_answers_the_same_requests(
    pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["tiny-class"]
    clock = CountedWork(pipeline, monkeypatch)
    bench = SloBench(pipeline, requests=12, budget=64, clock=clock)
    report = bench.run([0.1, 3.0], within=[5.0])
    assert [(row.load, row.policy) for row in report.rows] == [(load, each) for load in (0.1, 3.0) for each in POLICIES]
    rows = {(row.load, row.policy): row for row in report.rows}
    assert all(rows[0.1, policy].in_time == 1 for policy in (FIXED, ANYTIME))
    assert rows[0.1, ANYTIME].psnr == rows[0.1, FIXED].psnr == pytest.approx(report.psnr["standard"], abs=60)
    assert rows[3.0, FIXED].in_time < 1
    assert rows[3.0, FIXED].p99 > rows[0.1, FIXED].p99
    assert rows[0.1, REQUEST].lowered == rows[3.0, FIXED].lowered == 0


def test_latency_counts_the_wait_for_a_free_place(
    pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["tiny-class"]
    bench = SloBench(pipeline, requests=20, budget=4096, clock=CountedWork(pipeline, monkeypatch))
    found = bench.serve(FIXED, bench.arrivals, gap=0.0)
    assert max(found.seconds.values()) == pytest.approx(found.span)
    assert found.patches == pytest.approx(1000 * found.span)
