"""`REDIS_URL` in each of its forms."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from patchforge.service.redis_url import RedisUrl
from patchforge.service.settings import Settings


def test_one_server() -> None:
    target = RedisUrl.parse("rediss://user:p%40ss@queue.test:6380/3")
    assert target.addresses == (("queue.test", 6380),)
    assert target.options == {"username": "user", "password": "p@ss", "db": 3}
    assert target.tls
    assert target.service is None
    assert RedisUrl.parse("redis://").addresses == (("localhost", 6379),)
    assert RedisUrl.parse("unix:///run/redis.sock").addresses == ()


def test_sentinels() -> None:
    target = RedisUrl.parse("redis+sentinel://user:p%2Fss@one.test,two.test:26380,[::1]:5/my%20queue/3")
    assert target.addresses == (("one.test", 26379), ("two.test", 26380), ("::1", 5))
    assert target.options == {"username": "user", "password": "p/ss", "db": 3}
    assert target.service == "my queue"
    assert not target.tls
    target = RedisUrl.parse("rediss+sentinel://one.test/queue?ssl_check_hostname=no")
    assert target.tls
    assert target.options == {"ssl_check_hostname": False}


def test_a_password_is_not_shown() -> None:
    assert "s3cret" not in repr(RedisUrl.parse("redis://:s3cret@queue.test"))


@pytest.mark.parametrize(
    "url",
    [
        "http+sentinel://one.test/queue",
        "redis+sentinel://one.test",
        "redis+sentinel:///queue",
        "redis+sentinel://one.test,/queue",
        "redis+sentinel://one.test/queue/first",
        "redis+sentinel://:s3cret/x@one.test/queue",
        "redis+sentinel://one.test:port/queue",
        "memcached://one.test",
    ],
)
def test_what_is_none_of_these(url: str) -> None:
    with pytest.raises(ValidationError, match=r"redis\+sentinel://\[\[user\]:password@\]host") as caught:
        Settings(redis_url=url)
    assert "s3cret" not in str(caught.value)
