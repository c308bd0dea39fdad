"""`patchforge serve` and a worker that cannot start. tests/faults has workers that die."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
MISSING = 'raise ModuleNotFoundError("No module named \'torch\'", name="torch")\n'


def serve(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PATCHFORGE_", "REDIS_URL"))}
    ports = {"PATCHFORGE_HTTP_PORT": "0", "PATCHFORGE_GRPC_PORT": "0", "PATCHFORGE_DATA_DIR": str(folder / "data")}
    command = [sys.executable, "-P", "-m", "patchforge", "serve"]
    environment = kept | {"PYTHONPATH": str(ROOT)} | ports | settings
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_package_that_only_the_worker_misses_stops_everything(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(MISSING)
    ran = serve(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert ran.returncode == 1
    *log, last = ran.stderr.splitlines()
    assert last == (
        "error: the worker cannot start: this needs the package torch, which is not installed: "
        "pip install 'patchforge[worker]'"
    )
    assert any("gateway is shutting down" in line for line in log)
    assert not any("starting another" in line or "Traceback" in line for line in log)


def test_a_setting_that_asks_for_what_is_not_there_stops_everything(tmp_path: Path) -> None:
    ran = serve(tmp_path, PATCHFORGE_BUNDLE_DIR="absent")
    assert ran.returncode == 1
    *log, last = ran.stderr.splitlines()
    assert last == "error: the worker cannot start: absent: no such folder"
    assert not any("starting another" in line or "Traceback" in line for line in log)


def test_a_broken_bundle_stops_everything(tmp_path: Path, bundle_dir: Path) -> None:
    shutil.copytree(bundle_dir, tmp_path / "bundles")
    weights = tmp_path / "bundles" / "tiny-class" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = serve(tmp_path, PATCHFORGE_BUNDLE_DIR=str(tmp_path / "bundles"))
    assert ran.returncode == 1
    *log, last = ran.stderr.splitlines()
    assert last.startswith(f"error: the worker cannot start: {weights}: not a readable safetensors file")
    assert not any("starting another" in line or "Traceback" in line for line in log)


def test_a_bug_that_every_worker_would_meet_stops_everything(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('raise RuntimeError("out of luck")\n')
    ran = serve(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "error: the worker cannot start: RuntimeError: out of luck"
    assert "starting another" not in ran.stderr


def test_workers_that_are_killed_before_they_can_say_why_stop_everything(tmp_path: Path) -> None:
    """As the kernel does where there is too little memory for the models."""
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    ran = serve(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert ran.returncode == 1
    assert ran.stderr.count("starting another") == 4
    assert ran.stderr.splitlines()[-1] == (
        "error: 5 workers ended before they were ready, the last one killed: is there enough memory? "
        "See docs/hardware.md"
    )
