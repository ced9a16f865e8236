"""Mutants are changes of code, chosen by rule, and the same for the same seed."""

import ast
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, TESTS
from tests.survivors import SURVIVORS

SOURCE = b'''
"""A docstring of 1 + 2."""
def f(a: int, b):
    """2 > 1"""
    assert a > 1
    if a < b and not b:
        raise ValueError(1 + 2)
    return -a.float() + g(a, b)[0] * 0.5
'''


def test_each_rule() -> None:
    found = {
        (m.rule, m.applied(SOURCE).splitlines()[m.line - 1].strip()) for m in mutants.mutants("f.py", SOURCE)
    }
    assert found == {
        ("comparison", b"if a <= b and not b:"),
        ("and, or", b"if a < b or not b:"),
        ("dropped not", b"if a < b and b:"),
        ("operator", b"return -a.float() - g(a, b)[0] * 0.5"),
        ("operator", b"return -a.float() + g(a, b)[0] / 0.5"),
        ("dropped term", b"return -a.float()"),
        ("sign", b"return a.float() + g(a, b)[0] * 0.5"),
        ("dropped cast", b"return -a + g(a, b)[0] * 0.5"),
        ("swapped arguments", b"return -a.float() + g(b, a)[0] * 0.5"),
        ("constant", b"return -a.float() + g(a, b)[1] * 0.5"),
        ("constant", b"return -a.float() + g(a, b)[0] * 1.5"),
    }


@pytest.mark.parametrize("file", ["kernels/softmax.py", "ggam_fast/norm.py"])
def test_mutants_of_a_file_differ_from_it(file: str) -> None:
    source = (ROOT / file).read_bytes()
    found = mutants.mutants(file, source)
    assert len(found) > 20
    assert all(ast.dump(ast.parse(m.applied(source))) != ast.dump(ast.parse(source)) for m in found)


def test_files_and_their_tests_are_there() -> None:
    assert [path for path in TESTS if not (ROOT / path).is_file()] == []
    assert [path for tests in TESTS.values() for path in tests if not (ROOT / path).exists()] == []


def test_a_seed_is_an_order() -> None:
    files = ["kernels/softmax.py", "ggam_fast/norm.py"]
    assert mutants.sample(files, "a") == mutants.sample(files, "a")
    assert mutants.sample(files, "a") != mutants.sample(files, "b")
    assert sorted(mutants.sample(files, "a")) == sorted(mutants.sample(files, "b"))


def test_every_listed_survivor_is_a_mutant() -> None:
    for file, rows in SURVIVORS.items():
        source = (ROOT / file).read_bytes()
        known = {mutants.lines(m, source) for m in mutants.mutants(file, source)}
        assert [row for row in rows if row not in known] == []
        assert all(rows.values())


@pytest.mark.parametrize(
    ("code", "expected"),
    [("smaller = 2 > 1", "killed"), ("smaller = 2 < 1", "LIVES"), ("while True: pass", "timeout")],
)
def test_outcomes(code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("smaller = 1 > 2")
    (tmp_path / "test_code.py").write_text(
        "def test():\n    got = {}\n    exec(open('code.py').read(), got)\n    assert not got['smaller']"
    )
    monkeypatch.setitem(TESTS, "code.py", ["test_code.py"])
    mutant = mutants.Mutant("code.py", 1, 0, 15, code, "all")
    assert mutants.outcome(mutant, tmp_path, 3.0 if expected == "timeout" else 60.0) == expected
    assert (tmp_path / "code.py").read_text() == "smaller = 1 > 2"


def test_known_mutants_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = "ggam_fast/norm.py"
    first, second = mutants.mutants(file, (ROOT / file).read_bytes())[:2]
    monkeypatch.setattr(mutants, "KILLED", tmp_path / "killed.tsv")
    mutants.KILLED.write_text("another/file.py\ta\tb\n")
    for _ in range(2):
        mutants.add_known(mutants.row(second, (ROOT / file).read_bytes()))
    assert len(mutants.KILLED.read_text().splitlines()) == 2
    assert second in mutants.sample([file], "a", known=True)
    assert first not in mutants.sample([file], "a", known=True)
