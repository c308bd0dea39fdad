"""The command line: help, errors, offline pictures, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from patchforge.service.cli.main import app
from tests.written_settings import written_settings


def command(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.mark.parametrize("words", [(), ("train",), ("data",), ("bench",)])
def test_help_lists_the_commands(words: tuple[str, ...]) -> None:
    _, output = command(*words, "--help")
    assert "Commands" in output


def test_pictures_offline(bundle_dir: Path, tmp_path: Path) -> None:
    code, output = command(
        "generate", "dog", "cat", "--bundle", bundle_dir / "tiny-class", "--out", tmp_path, "--seed", "0"
    )
    assert code == 0
    assert output.count("saved 1") == 2  # 18.75 %
    with Image.open(tmp_path / "dog-0.png") as dog, Image.open(tmp_path / "cat-0.png") as cat:
        assert dog.size == (32, 32)
        assert dog.tobytes() != cat.tobytes()


def test_another_size_of_the_model_offline(bundle_dir: Path, tmp_path: Path) -> None:
    where = "--bundle", bundle_dir / "tiny-text", "--out", tmp_path, "--steps", "1", "--seed", "0"
    code, output = command("generate", "dog", *where, "--size", "32x16")
    assert code == 0, output
    with Image.open(tmp_path / "dog-0.png") as dog:
        assert dog.size == (32, 16)


def test_a_prompt_longer_than_the_model_reads_is_told(bundle_dir: Path, tmp_path: Path) -> None:
    words = ["--bundle", bundle_dir / "tiny-text", "--out", tmp_path]
    for prompt, negative, told in (("dog", "cat", 0), ("dog " * 50, "cat", 1), ("dog", "cat " * 50, 1)):
        code, output = command("generate", prompt, "--negative-prompt", negative, *words)
        assert code == 0, output
        assert output.count("longer than the model reads") == told


def test_several_seeds_a_grid_and_metadata_offline(bundle_dir: Path, tmp_path: Path) -> None:
    where = "--bundle", bundle_dir / "tiny-class", "--out", tmp_path, "--steps", "1"
    code, output = command("generate", "dog", "cat", *where, "--seed", "3", "-n", "2", "--grid")
    assert code == 0, output
    with Image.open(tmp_path / "grid.png") as sheet, Image.open(tmp_path / "cat-4.png") as cat:
        assert sheet.size == (64, 64)
        assert sheet.crop((32, 32, 64, 64)).tobytes() == cat.convert("RGB").tobytes()
    assert written_settings((tmp_path / "cat-4.png").read_bytes())[1]["class_label"] == "cat"
    code, output = command("generate", "cat", *where, "--seed", "4", "--no-metadata")
    assert code == 0, output
    with Image.open(tmp_path / "cat-4-2.png") as again, Image.open(tmp_path / "cat-4.png") as cat:
        assert again.info == {}
        assert again.tobytes() == cat.tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "folder", "{bundles}", "--out", "x.npz", "--size", "60"], "multiple of 8, such as 56 or 64"),
        (["data", "emoji", "--size", "252"], "multiple of 8, such as 248 or 256"),
        (["generate"], "give a prompt, or --prompts"),
        (["generate", "x", "--server", "http://x", "--prompts", "{bundles}/tiny-class/model.safetensors"], "UTF-8"),
        (["generate", "cat", "--bundle", "{bundles}/tiny-class", "--out", "/dev/null/x"], "--out /dev/null/x: Not a"),
        (["generate", "unicorn", "--bundle", "{bundles}/tiny-class"], "unicorn"),
        (["generate", "x", "--bundle", "{bundles}/absent"], "no such file"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--sampler", "warp"], "warp"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--steps", "0"], "steps"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--size", "64x64"], "draws 32x32, 16x16, 32x16"),
        (["generate", "x", "--bundle", "{bundles}/tiny-text", "--size", "large"], "WIDTHxHEIGHT"),
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
    assert leaps == [False, True, True, False], (
        "the bend is known from the third step on, and there is no leap in the last step"
    )
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
    uniform = [row["options"]["steps"] for row in rows if row["family"] == "uniform, guidance interval"]
    assert uniform == 2 * [4, 6, 8, 10, 12]

    code, output = command(
        "bench", "sampler", bundle_dir / "tiny-class", *some, "--family", "paper, cheaper", "--out", out
    )
    assert code == 0, output
    assert {row["sampler"] for row in json.loads(out.read_text())} == {"dual_loop"}
    code, output = command("bench", "sampler", bundle_dir / "tiny-class", *some, "--family", "papers")
    assert code != 0
    assert "there is no family 'papers'" in output
    assert {row["sampler"] for row in rows} == {"dual_loop", "euler", "adaptive"}


def test_bench_forward_writes_rows_and_a_plot(bundle_dir: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "forward.png"
    where = ("--bundle", bundle_dir / "tiny-class", "--rounds", "1", "--out", out, "--plot", plot)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: forward -->\n<!-- end: forward -->")
    code, output = command("bench", "forward", "--size", "tiny", *where, "--doc", page, "--threads", "1")
    assert code == 0
    assert "| tiny | dense as the paper |" in page.read_text()
    assert "30% of the patches" in output
    assert {row["size"] for row in json.loads(out.read_text())} == {"tiny"}
    with Image.open(plot) as picture:
        assert picture.width > 300


@pytest.mark.timeout(600)  # four processes, three of which load torch
def test_bench_threads_writes_a_table_and_rows(bundle_dir: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("<!-- begin: threads, tiny-class -->\n<!-- end: threads, tiny-class -->")
    where = ("--bundle", bundle_dir / "tiny-class", "--threads", "2", "--out", out, "--doc", page)
    code, output = command("bench", "threads", "--rounds", "1", *where)
    assert code == 0
    assert "OpenMP" in output
    assert "| 8, guided | parts |" in page.read_text()
    rows = json.loads(out.read_text())
    assert len(rows) == 15
    assert all(row["quiet"] > 0 < row["busy"] for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--size", "huge"], "huge"), (["--size", "tiny", "--bundle", "{bundles}/tiny-text"], "class")],
)
def test_bench_forward_refuses_what_it_cannot_measure(words: list[str], message: str, bundle_dir: Path) -> None:
    code, output = command("bench", "forward", *(word.format(bundles=bundle_dir) for word in words))
    assert code == 1
    assert message in output


@pytest.fixture
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchforge.service.bench import engine

    monkeypatch.setattr(engine, "WARM_UP", 1)


@pytest.mark.usefixtures("short_warm_up")
def test_bench_engine_writes_figures_and_a_plot(bundle_dir: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "figures.json", tmp_path / "engine.png"
    where = ("--bundle-dir", bundle_dir, "--requests", "4", "--load", "1", "--patch-budget", "128", "--threads", "1")
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


@pytest.mark.usefixtures("short_warm_up")
def test_bench_engine_against_request_level_batching_only(bundle_dir: Path, tmp_path: Path) -> None:
    name = "engine, tiny-text, adaptive only, long"
    page, names = tmp_path / "page.md", (name, f"{name} at equal p95")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    what = ("--requests", "4", "--load", "1", "--patch-budget", "128", "--long", "--adaptive-only", "--doc", page)
    code, output = command("bench", "engine", "--bundle", bundle_dir / "tiny-text", *what, "--threads", "1")
    assert code == 0, output
    assert page.read_text().count("| request-level batching |") == 3
    assert "one at a time" not in page.read_text()


@pytest.mark.usefixtures("short_warm_up")
def test_bench_engine_with_several_sizes(bundle_dir: Path, tmp_path: Path) -> None:
    page, names = tmp_path / "page.md", ("engine, sizes", "engine, sizes at equal p95")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    sizes = [word for size in ("32x32", "16x32", "16x16") for word in ("--size", size)]
    what = ("--requests", "4", "--load", "1", "--patch-budget", "128", "--doc", page, "--threads", "1")
    code, output = command("bench", "engine", "--bundle-dir", bundle_dir, *sizes, *what)
    assert code == 0, output
    assert page.read_text().count("| request-level batching |") == 3
    assert page.read_text().count("| ours: patches of all requests |") == 2
    code, output = command("bench", "engine", "--bundle-dir", bundle_dir, "--size", "64x64", *what)
    assert (code, "64x64 has more patches than the model's own" in output) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpu-clock"], "--threads 1"),
        (["--bundle-dir", "absent"], "absent"),
        (["--bundle", "a", "--bundle-dir", "b"], "together with --bundle-dir"),
    ],
)
def test_bench_engine_refuses_what_it_cannot_measure(words: list[str], message: str) -> None:
    code, output = command("bench", "engine", *words)
    assert code == 1
    assert message in output
