"""The command line's own behaviour: help, errors, offline pictures, measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from service.cli import app


def command(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.mark.parametrize("words", [(), ("train",), ("data",), ("bench",)])
def test_help_lists_the_commands(words: tuple[str, ...]) -> None:
    _, output = command(*words, "--help")
    assert "Commands" in output


def test_pictures_offline(bundle_dir: Path, tmp_path: Path) -> None:
    code, output = command("generate", "dog", "cat", "--bundle", bundle_dir / "tiny-class", "--out", tmp_path)
    assert code == 0
    assert output.count("saved 1") == 2  # 18.75 %
    with Image.open(tmp_path / "00-dog-0.png") as dog, Image.open(tmp_path / "01-cat-0.png") as cat:
        assert dog.size == (32, 32)
        assert dog.tobytes() != cat.tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "unicorn", "--bundle", "{bundles}/tiny-class"], "unicorn"),
        (["generate", "x", "--bundle", "{bundles}/absent"], "no such file"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--sampler", "warp"], "warp"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--steps", "0"], "steps"),
        (["verify", "{bundles}/absent.safetensors"], "not a golden file"),
        (["worker"], "REDIS_URL"),
        (["gateway"], "REDIS_URL"),
    ],
)
def test_errors_are_one_clear_line(
    words: list[str], message: str, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    code, output = command(*(word.format(bundles=bundle_dir) for word in words))
    assert code != 0
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("name", "value"), [("HTTP_PORT", "abc"), ("MODELS", '["emoji-text"'), ("MAX_WAITING", "0")])
def test_a_bad_setting_is_one_clear_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PATCHFORGE_{name}", value)
    code, output = command("serve")
    assert code == 2
    assert name.lower() in output.lower()
    assert "Traceback" not in output


def test_bench_compares_samplers_with_their_dense_form(bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    some = (
        "--sampler",
        "dual_loop",
        "--sampler",
        "euler",
        "--sampler",
        "adaptive",
        "--prompt",
        "cat",
        "--threads",
        "1",
    )
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in ("samplers", "leaps")))
    code, output = command("bench", "sampler", bundle_dir / "tiny-class", *some, "--out", out, "--doc", page)
    assert code == 0, output
    assert "PSNR" in output
    assert "| dual_loop steps=8 quantile=0.7 inner_steps=4 exact=True |" in page.read_text()
    leaps = [f"| 6 | 0.{hundredths} |" in page.read_text() for hundredths in (17, 33, 67, 83)]
    assert leaps == [False, True, True, False], "a bend is known from the third step on; the last leaps over nothing"
    rows = json.loads(out.read_text())
    dense, cached = (
        next(row for row in rows if row["options"].get("quantile") == 0.7 and row["options"]["exact"] is exact)
        for exact in (True, False)
    )
    assert dense["saved"] == 0
    assert cached["patch_evaluations"] < dense["patch_evaluations"]
    assert cached["gflop"] < dense["gflop"]
    euler = [row["psnr"] for row in rows if row["sampler"] == "euler"]
    assert euler == sorted(euler)  # more steps come closer to the fine solution
    assert {row["sampler"] for row in rows} == {"dual_loop", "euler", "adaptive"}


def test_bench_forward_writes_rows_and_a_plot(bundle_dir: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "forward.png"
    where = ("--bundle", bundle_dir / "tiny-class", "--rounds", "1", "--out", out, "--plot", plot)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: forward -->\n<!-- end: forward -->")
    code, output = command("bench", "forward", "--size", "tiny", *where, "--doc", page)
    assert code == 0
    assert "| tiny | dense as the paper |" in page.read_text()
    assert "30% of the patches" in output
    assert {row["size"] for row in json.loads(out.read_text())} == {"tiny"}
    with Image.open(plot) as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--size", "huge"], "huge"), (["--size", "tiny", "--bundle", "{bundles}/tiny-text"], "class")],
)
def test_bench_forward_refuses_what_it_cannot_measure(words: list[str], message: str, bundle_dir: Path) -> None:
    code, output = command("bench", "forward", *(word.format(bundles=bundle_dir) for word in words))
    assert code == 1
    assert message in output


def test_bench_engine_writes_figures_and_a_plot(bundle_dir: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "figures.json", tmp_path / "engine.png"
    where = ("--bundle-dir", bundle_dir, "--requests", "4", "--load", "1", "--patch-budget", "128")
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in ("engine", "engine at equal p95"))
    )
    code, output = command("bench", "engine", *where, "--out", out, "--plot", plot, "--doc", page)
    assert code == 0, output
    assert page.read_text().count("| request-level batching |") == 3  # all waiting, the load, and at its p95
    assert "request-level batching" in output
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == 10
    assert figures["largest_latent_difference_from_running_alone"] < 1e-4
    with Image.open(plot) as picture:
        assert picture.width > 300


def test_bench_engine_against_request_level_batching_only(bundle_dir: Path, tmp_path: Path) -> None:
    page, names = tmp_path / "page.md", ("engine, adaptive only, long", "engine, adaptive only, long at equal p95")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    what = ("--requests", "4", "--load", "1", "--patch-budget", "128", "--long", "--adaptive-only", "--doc", page)
    code, output = command("bench", "engine", "--bundle-dir", bundle_dir, *what)
    assert code == 0, output
    assert page.read_text().count("| request-level batching |") == 3
    assert "one at a time" not in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"), [(["--cpu-clock"], "--threads 1"), (["--bundle-dir", "absent"], "absent")]
)
def test_bench_engine_refuses_what_it_cannot_measure(words: list[str], message: str) -> None:
    code, output = command("bench", "engine", *words)
    assert code == 1
    assert message in output
