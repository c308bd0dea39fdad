"""Linux control groups: they limit the cores and the memory of a container's processes.

Here, because the gateway must not import from `model`, nor the model from `service`, and both are limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def own_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's control groups that `controller` may limit, and their version, 1 or 2.

    From its own group to the outermost visible one; none if the system is not Linux. Some may not exist. `root`
    contains `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, version = ("", "unified"), 2
        elif controller in controllers.split(","):
            mounts, version = (controllers, controller), 1
        else:
            continue
        # In a container, the path may be the host's, and not or only partly exist here. So its parents are tried too.
        own = Path(path.lstrip("/"))
        for folder in {root / "sys/fs/cgroup" / mount / group for mount in mounts for group in (own, *own.parents)}:
            yield folder, version
