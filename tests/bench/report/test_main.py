"""`python -m bench.report` writes and checks the page, and refuses a partial one."""

from pathlib import Path

import pytest

from bench.report import page
from bench.report.__main__ import main
from tests.bench.report.files import GPU, host_file, result_file


def test_page_is_stale_after_another_host_file(tmp_path: Path) -> None:
    written, host = tmp_path / "page.md", host_file(tmp_path)
    written.write_text(page.block([host]))
    arguments = [str(host), "--page", str(written), "--check"]
    assert main(arguments) == 0
    host_file(tmp_path, fused=151.0)
    assert main(arguments) == 1


def test_projects_page_is_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(result_file(tmp_path, GPU, ("cold",))), "--check"])
    assert "shows all result files" in capsys.readouterr().err


def test_stale_page_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, written = result_file(tmp_path, GPU, ("cold",)), tmp_path / "page.md"
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    arguments = [str(path), "--page", str(written), "--plots", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    assert written.read_text().startswith("before\n")
    assert written.read_text().endswith("\nafter\n")
    for name in ("time", "speedup", "memory"):
        assert (tmp_path / f"{path.stem}-{name}.png").stat().st_size > 1000
