"""Programs of a kernel that run at the same time, under Triton's interpreter: an adversary picks who goes on.

Each program is a thread, and one thread runs at a time: before every load, store and atomic operation the
one with the highest priority goes on.  Now and then it falls to the lowest priority, in the middle of a task:
that task stays half done until all others wait, and whoever should wait but does not reads what is not stored
yet.  Random priorities with random changes are the scheduler of Burckhardt et al., "A randomized scheduler
with probabilistic guarantees of finding bugs" (ASPLOS 2010).

The order of operations is covered, not the GPU's memory model: a store is seen as soon as it is made.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Adversary:
    """Hands the permission to run from program to program."""

    def __init__(self, programs: int, seed: int, change: float) -> None:
        self.random = random.Random(seed)
        self.change = change  # how likely a program falls to the lowest priority, at each operation
        self.order = self.random.sample(range(programs), programs)  # the highest priority first
        self.waiting: set[int] = set()  # until something is counted
        self.polled: set[int] = set()  # since something was counted
        self.turn = threading.Condition()
        self.changes = 0
        self.error: BaseException | None = None

    def goes_on(self, program: int) -> bool:
        """Whether it is this program's turn."""
        return program == next((p for p in self.order if p not in self.waiting), None)

    def wait_for_turn(self, program: int) -> None:
        with self.turn:
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.error is not None or self.goes_on(program))
            if self.error is not None:
                raise RuntimeError("another program failed") from self.error

    def step(self, program: int, atomic: bool, adds: bool) -> None:
        """Before an operation of this program: it goes on, or others first."""
        if atomic and not adds:
            if program in self.polled:
                self.waiting.add(program)
                if len(self.waiting) == len(self.order):
                    raise RuntimeError("deadlock: every program waits")
            self.polled.add(program)
        if self.random.random() < self.change:
            self.order.remove(program)
            self.order.append(program)
            self.changes += 1
        self.wait_for_turn(program)
        if adds:
            self.waiting.clear()
            self.polled.clear()

    def leave(self, program: int, error: BaseException | None) -> None:
        with self.turn:
            self.order.remove(program)
            self.error = self.error or error
            self.turn.notify_all()


@contextmanager
def interleaved(seed: int, change: float = 0.06) -> Iterator[list[Adversary]]:
    """Run the programs of every launch inside at the same time; gives the launches' adversaries."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, patch_lang = executor.__call__, interpreter._patch_lang
    here = threading.local()
    adversaries: list[Adversary] = []

    def stepping(name: str) -> Any:
        operation = getattr(builder, name)
        atomic = name == "create_atomic_rmw"

        def run(self: Any, *args: Any) -> Any:
            adversaries[-1].step(here.program, atomic, atomic and bool(args[2].data.any()))
            return operation(self, *args)

        return run

    class Unrestored:
        def restore(self) -> None:
            """The first program to end must not take the language from the others."""

    def launch_at_once(self: Any, *args: Any, **kwargs: Any) -> None:
        adversary = Adversary(self.grid[0], seed, change)
        adversaries.append(adversary)
        one = executor(self.fn, self.arg_names, (1,), self.pre_run_hooks)

        def program(i: int) -> None:
            here.program, error = i, None
            try:
                adversary.wait_for_turn(i)
                launch(one, *args, **kwargs)
            except BaseException as raised:
                error = raised
            adversary.leave(i, error)

        scope = patch_lang(self.fn)
        patch.setattr(interpreter, "_patch_lang", lambda fn: (patch_lang(fn), Unrestored())[1])
        threads = [threading.Thread(target=program, args=(i,)) for i in range(self.grid[0])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        scope.restore()
        if adversary.error is not None:
            raise adversary.error

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_atomic_rmw", "create_masked_load", "create_masked_store"):
            patch.setattr(builder, name, stepping(name))
        patch.setattr(executor, "__call__", launch_at_once)
        yield adversaries
