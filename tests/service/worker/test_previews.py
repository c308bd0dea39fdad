"""Previews come at their interval and never take more than their share."""

import pytest

from patchforge.service.worker.previews import SAVED_SECONDS, PreviewPace


def test_each_picture_is_shown_at_its_interval() -> None:
    pace = PreviewPace(interval=1.0, share=1.0)
    assert pace.due([None, 9.5, 8.9], now=10.0) == [0, 2]


def test_who_was_never_shown_comes_first_then_who_was_shown_longest_ago() -> None:
    pace = PreviewPace(interval=0.0, share=0.1)
    pace.showed(1, 0.04)  # 0.06 s are left, and a preview takes 0.04 s
    assert pace.due([5.0, None, 3.0], now=10.0) == [1]
    assert pace.due([5.0, 4.0, 3.0], now=10.0) == [2]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_all_together_keep_to_their_share_however_many_want_to_be_shown(share: float) -> None:
    pace, last = PreviewPace(interval=0.0, share=share), [None] * 40
    worked = shown = 0.0
    for step in range(1, 2000):
        pace.worked(0.02)
        worked += 0.02
        due = pace.due(last, now=float(step))
        for index in due:
            last[index] = float(step)
        pace.showed(len(due), 0.01 * len(due))
        shown += 0.01 * len(due)
    assert shown == pytest.approx(share * worked + SAVED_SECONDS, abs=0.1)
    assert min(each for each in last if each is not None) > 1000  # and no picture is forgotten


def test_a_pause_saves_up_no_burst() -> None:
    pace = PreviewPace(interval=0.0, share=0.2)
    pace.showed(1, 0.01)
    pace.worked(3600)
    assert len(pace.due([None] * 100, now=1.0)) <= 11
