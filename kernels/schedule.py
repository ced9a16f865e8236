"""One persistent launch instead of several: tickets, and counters that say what is finished.

A fused kernel's work is cut into phases (of one group of images) and tasks (of one phase).  Every program
draws tickets from one integer; a ticket names its task by arithmetic alone:

    round = ticket // tasks_per_round      phase 0 of group round, then phase 1 of group (round - LAG)

(`plan.REREAD_LAG`) so that phase 1 of a group comes after tasks of other groups: what it waits for has been
going on for a while, and the part of A that it reads again may still be in the L2 cache.
Tickets are drawn in order, so the oldest unfinished task never waits for one that no running program has
drawn: no deadlock, however few programs run, one after another in the interpreter included.

Within a task, tiles of A come through shared memory by asynchronous copies, several under way at once
(`plan.Resources`): that is what `num_stages` on its loops asks the compiler for.

`finish` makes a task's stores visible before it counts the task; `wait` sees them after it saw the count: its
acquire empties the L1 cache.  What others stored is loaded with ".cg", past that cache, except by copies too
narrow for it, which come after that acquire.  The counters are zeroed before every launch and belong to it
alone.

On AMD the barrier of `finish` does not wait for other waves' stores: `ops` goes pass by pass there.
"""

import triton
import triton.language as tl


class condition(tl.condition):
    """As in Triton, for interpreters before 3.9 too, which take every condition object for true.

    `disable_licm` keeps the offsets of every phase inside the loop over tickets: moved out of it, they would
    take registers in all phases."""

    __triton_builtin__ = True  # kernels may call it

    def __bool__(self):
        return bool(self.condition)


@triton.jit
def draw(ticket_ptr):
    """The next ticket."""
    return tl.atomic_add(ticket_ptr, 1, sem="relaxed")


@triton.jit
def finish(counter_ptr):
    """Count a task of this program as done, after all its stores."""
    tl.debug_barrier()  # the stores of all threads, before the one thread that counts
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def finish_and_count(counter_ptr):
    """As `finish`; returns how many were done before, whose stores can be loaded then."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def wait(counter_ptr, tasks):
    """Return when `tasks` tasks are done; their stores can be loaded then."""
    done = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while done < tasks:
        done = tl.atomic_add(counter_ptr, 0, sem="acquire")
