"""Change one line at a time and see whether a test fails.

    python -m tests.mutants --list                  the number of mutants of each file
    python -m tests.mutants --minutes 30 --seed 1   a random sample, as many as fit
    python -m tests.mutants kernels/guidance.py     the mutants of one file
    python -m tests.mutants --known --minutes 2     a sample of those that tests noticed before

Mutants are chosen by rule, never by hand: a comparison or an arithmetic operator, a sign, a constant or an
index, a term, a mask's two values, `and` for `or`, a dropped `not`, a dropped cast, two swapped arguments.
Docstrings, annotations, assertions and errors are left alone.  The tests of a mutant's file run in a changed
copy of the checkout until one fails.  A mutant that lives is printed: either a test is missing, or the change
means nothing.  Changes that mean nothing are listed in tests/survivors.py with the reason.  Only a survivor
that is not listed makes the exit status 1.

tests/killed.tsv has the mutants that tests noticed so far, and `--record` adds to it.  With `--known` only
these are drawn.  If one of them lives, a test has become weaker.
"""

import argparse
import ast
import compileall
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.survivors import SURVIVORS

ROOT = Path(__file__).resolve().parent.parent
KILLED = ROOT / "tests" / "killed.tsv"  # file, line before, line after
_PARITY = "tests/head/test_parity.py"
_TRITON, _KERNELS, _MEASURE = "tests/backends/triton", "tests/kernels", "tests/training/measure"
# The quickest first: a mutant is done with at the first test that fails.
TESTS: dict[str, list[str]] = {
    "kernels/batch_norm.py": [f"{_KERNELS}/test_batch_norm.py", f"{_TRITON}/test_layers.py"],
    "kernels/channel_sum.py": [f"{_KERNELS}/test_tiles.py", f"{_TRITON}/test_sums.py"],
    "kernels/cross_entropy.py": [f"{_TRITON}/test_cross_entropy.py", f"{_KERNELS}/test_cross_entropy.py"],
    "kernels/features_grad.py": [f"{_KERNELS}/test_tiles.py", f"{_TRITON}/test_features_grad.py"],
    "kernels/grad_cam_means.py": [f"{_TRITON}/test_pooling.py", f"{_KERNELS}/test_tiles.py"],
    "kernels/guidance.py": [
        f"{_KERNELS}/test_guidance.py",
        f"{_TRITON}/test_guidance.py",
        f"{_TRITON}/test_extremes.py",
    ],
    "kernels/hadamard.py": [f"{_TRITON}/test_pooling.py", f"{_KERNELS}/test_tiles.py"],
    "kernels/layer_grads.py": [f"{_KERNELS}/test_layer_grads.py", f"{_TRITON}/test_layer_grads.py"],
    "kernels/max_pool.py": [f"{_KERNELS}/test_max_pool.py", f"{_TRITON}/test_pooling.py"],
    "kernels/position_guidance.py": [f"{_TRITON}/test_positions.py"],
    "kernels/position_scatter.py": [f"{_TRITON}/test_pooling.py", f"{_KERNELS}/test_tiles.py"],
    "kernels/product.py": [f"{_KERNELS}/test_product.py", f"{_TRITON}/test_layers.py"],
    "kernels/softmax.py": [f"{_KERNELS}/test_softmax.py", f"{_TRITON}/test_extremes.py"],
    "kernels/spatial_norm.py": [f"{_TRITON}/test_extremes.py", f"{_TRITON}/test_sums.py"],
    "kernels/spatial_sum.py": [f"{_KERNELS}/test_spatial_sum.py", f"{_TRITON}/test_sums.py"],
    "ggam_fast/autograd.py": ["tests/test_differentiable.py", _PARITY, "tests/test_autograd.py"],
    "ggam_fast/backends/torch.py": [
        "tests/backends/test_torch.py",
        "tests/test_entropy.py",
        "tests/classifier",
        _PARITY,
    ],
    "ggam_fast/classifier/rules.py": ["tests/classifier"],
    "ggam_fast/closed_form.py": ["tests/test_closed_form.py", _PARITY],
    "ggam_fast/entropy.py": ["tests/test_entropy.py", "tests/test_losses.py"],
    "ggam_fast/guidance.py": ["tests/test_guidance.py", "tests/test_losses.py", "tests/test_positions.py"],
    "ggam_fast/losses.py": ["tests/test_losses.py", "tests/test_errors.py"],
    "ggam_fast/norm.py": ["tests/test_norm.py"],
    "ggam_fast/training/measure/classification.py": [f"{_MEASURE}/test_classification.py"],
    "ggam_fast/training/measure/faithfulness.py": [f"{_MEASURE}/test_faithfulness.py"],
    "ggam_fast/training/measure/geometry.py": [f"{_MEASURE}/test_geometry.py"],
    "ggam_fast/training/measure/localization.py": [f"{_MEASURE}/test_localization.py"],
}
for _file in [file for file in TESTS if file.startswith("kernels/")]:
    TESTS[_file] += [f"{_KERNELS}/test_guards.py", f"{_KERNELS}/test_far_images.py"]
# Of five memory layouts the two that have code of their own.
_QUICK = "not sliced and not transposed"
_COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
_CASTS = {"to", "float", "double", "contiguous", "detach", "clone"}


class Mutant(NamedTuple):
    """The bytes [begin, end) of a file replaced."""

    file: str
    line: int
    begin: int
    end: int
    text: str
    rule: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.begin] + self.text.encode() + source[self.end :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of the file, in the order of its lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree, found = ast.parse(source), []

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(node: ast.AST) -> str:
        return source[begin(node) : end(node)].decode()

    def add(node: ast.AST, span: tuple[int, int], new: str, rule: str) -> None:
        found.append(Mutant(file, node.lineno, *span, new, rule))  # type: ignore[attr-defined]

    def between(left: ast.AST, right: ast.AST, old: str, new: str, node: ast.AST, rule: str) -> None:
        at = source.find(old.encode(), end(left), begin(right))
        if at >= 0:
            add(node, (at, at + len(old)), new, rule)

    for node in _code(tree):
        whole = (begin(node), end(node)) if hasattr(node, "lineno") else (0, 0)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            symbol = source[end(node.left) : begin(node.comparators[0])].decode().strip(" ()\n")
            if symbol in _COMPARE:
                between(node.left, node.comparators[0], symbol, _COMPARE[symbol], node, "comparison")
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            old, new = _ARITHMETIC[type(node.op)]
            between(node.left, node.right, old, new, node, "operator")
            if isinstance(node.op, (ast.Add, ast.Sub)):
                add(node, whole, text(node.left), "dropped term")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            add(node, whole, text(node.operand), "sign" if isinstance(node.op, ast.USub) else "dropped not")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            add(node, whole, repr(node.value + 1), "constant")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            between(node.values[0], node.values[1], old, new, node, "and, or")
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in _CASTS and isinstance(node.func, ast.Attribute):
                add(node, whole, text(node.func.value), "dropped cast")
            a, b = (
                (node.args[-2], node.args[-1])
                if name == "where" and len(node.args) == 3
                else (*node.args, None, None)[:2]
            )
            if a is not None and b is not None and text(a) != text(b) and not isinstance(a, ast.Starred):
                middle = source[end(a) : begin(b)].decode()
                add(node, (begin(a), end(b)), text(b) + middle + text(a), "swapped arguments")
    kept = [m for m in found if _parses(m.applied(source))]
    return sorted(kept, key=lambda m: (m.begin, m.end, m.text))


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: not docstrings, annotations, decorators, assertions and errors."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
            value, ast.JoinedStr
        ):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, (ast.Assert, ast.Raise, ast.Import, ast.ImportFrom)):
                continue
            if isinstance(node, ast.AST):
                yield node
                yield from _code(node)


def _parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def sample(files: Sequence[str], seed: str, known: bool = False) -> list[Mutant]:
    """All mutants of the files, or the known ones, in an order that depends on the seed alone."""
    sources = {file: (ROOT / file).read_bytes() for file in files}
    every = [m for file in files for m in mutants(file, sources[file])]
    if known:
        noticed = set(KILLED.read_text().splitlines())
        every = [m for m in every if row(m, sources[m.file]) in noticed]
    random.Random(seed).shuffle(every)
    return every


def row(mutant: Mutant, source: bytes) -> str:
    """The mutant's row in `KILLED`."""
    return "\t".join((mutant.file, *lines(mutant, source)))


def lines(mutant: Mutant, source: bytes) -> tuple[str, str]:
    """The mutant's lines before and after the change, with one space between words.

    A line that has occurred before in the file is numbered, as in "return x [2]".
    """
    begin = source.rfind(b"\n", 0, mutant.begin) + 1
    end = source.find(b"\n", mutant.end) % (len(source) + 1)
    changed = source[begin : mutant.begin] + mutant.text.encode() + source[mutant.end : end]
    before, after = (" ".join(text.decode().split()) for text in (source[begin:end], changed))
    earlier = [" ".join(text.decode().split()) for text in source[:begin].splitlines()].count(before)
    return before + f" [{earlier + 1}]" * (earlier > 0), after


def explained(mutant: Mutant, source: bytes) -> bool:
    """Whether tests/survivors.py says why no test can notice the mutant."""
    return lines(mutant, source) in SURVIVORS.get(mutant.file, {})


def outcome(mutant: Mutant, checkout: Path, timeout: float) -> str:
    """LIVES if all tests of the mutant's file pass, killed if one fails, timeout if they take too long."""
    path = checkout / mutant.file
    source = path.read_bytes()
    try:
        path.write_bytes(mutant.applied(source))
        # A copy of this process has torch imported already.
        run = multiprocessing.get_context("fork").Process(target=_test, args=(checkout, TESTS[mutant.file]))
        run.start()
        run.join(timeout)
        if run.is_alive():
            os.killpg(run.pid or 0, signal.SIGKILL)
            run.join()
            return "timeout"
        if run.exitcode in (4, 5):
            raise RuntimeError(
                f"pytest ran none of {', '.join(TESTS[mutant.file])}: exit status {run.exitcode}"
            )
        return "killed" if run.exitcode else "LIVES"
    finally:
        path.write_bytes(source)


def _test(checkout: Path, tests: Sequence[str]) -> None:
    """Run the tests in the checkout and exit with pytest's status."""
    import pytest

    os.setsid()
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ.update(
        PYTHONPATH=str(checkout), PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    sys.dont_write_bytecode = True
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-m", "not slow", "-k", _QUICK]
    os._exit(int(pytest.main([*options, *tests])))


def _import_what_no_mutant_changes() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("tests.conftest")  # torch, and the interpreter where there is no GPU
    for name in ("pytest", "hypothesis", "numpy", "scipy", "torch._dynamo", "triton", "torchvision", "timm"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def add_known(added: str) -> None:
    rows = {*KILLED.read_text().splitlines(), added}
    KILLED.write_text("".join(f"{one}\n" for one in sorted(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="files to change (default: all)")
    parser.add_argument("--list", action="store_true", help="print how many mutants there are, and stop")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after this time")
    parser.add_argument("--seed", default="0", help="which mutants come first, such as a commit's hash")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the tests of one mutant")
    parser.add_argument("--known", action="store_true", help="only mutants that tests noticed before")
    parser.add_argument("--record", action="store_true", help="add those that tests notice to the known ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each mutant")
    chosen = parser.parse_args(arguments)
    files = chosen.files or list(TESTS)
    if unknown := [file for file in files if file not in TESTS]:
        parser.error(f"no tests are known for {', '.join(unknown)}; choose from {', '.join(TESTS)}")
    if chosen.list:
        for file in files:
            print(f"{len(mutants(file, (ROOT / file).read_bytes())):5d}  {file}")
        return 0
    began, tried, survivors = time.monotonic(), 0, 0
    _import_what_no_mutant_changes()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout")
        shutil.copytree(
            ROOT, checkout, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs")
        )
        # A time stamp would not tell two mutants of one second apart.
        by_content = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(checkout, quiet=2, invalidation_mode=by_content)
        for mutant in sample(files, chosen.seed, chosen.known):
            if time.monotonic() - began > 60 * chosen.minutes:
                break
            known = explained(mutant, (ROOT / mutant.file).read_bytes())
            start = time.monotonic()
            word = "listed" if known else outcome(mutant, checkout, chosen.timeout)
            survivors += word == "LIVES"
            tried += 1
            print(f"{word:7} {mutant.file}:{mutant.line}: {mutant.rule}: {mutant.text!r}", flush=True)
            if chosen.record and word == "killed":
                add_known(row(mutant, (ROOT / mutant.file).read_bytes()))
            record = {**mutant._asdict(), "outcome": word, "seconds": round(time.monotonic() - start, 1)}
            if chosen.json:
                with chosen.json.open("a") as log:
                    log.write(json.dumps(record) + "\n")
    print(f"{tried} mutants in {time.monotonic() - began:.0f} s, {survivors} live that are not listed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
