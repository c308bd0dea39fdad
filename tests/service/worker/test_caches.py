"""Bytes of keys and values are granted while there are any, and a single picture can always run."""

from patchforge.service.worker.caches import CacheBudget


def test_room_is_granted_until_the_limit_and_again_once_released() -> None:
    caches = CacheBudget(100)
    assert caches.grant("a", 60)
    assert not caches.grant("b", 60)
    assert caches.grant("c", 40)
    assert caches.used == 100
    caches.release("a")
    assert caches.grant("b", 60)


def test_who_has_room_keeps_it() -> None:
    caches = CacheBudget(100)
    assert caches.grant("a", 90)
    assert caches.grant("a", 90)
    assert caches.used == 90


def test_one_that_needs_more_than_there_is_runs_when_it_is_the_only_one() -> None:
    caches = CacheBudget(100)
    assert caches.grant("a", 10)
    assert not caches.grant("b", 500)
    caches.release("a")
    assert caches.grant("b", 500)
    assert not caches.grant("a", 10)
    caches.release("never there")
