"""The shapes, types, layouts and passes that can be timed, and those that are timed by default."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

PASSES = ("fwd", "fwd_beta", "beta", "step")
LAYOUTS = ("nchw", "channels_last", "nlc")

COMPILED_REFERENCE = ("compiled", "compiled_max_autotune", "compiled_reduce_overhead")
COMPILED_PEERS = (*COMPILED_REFERENCE, "compiled_closed_form")
FUSED_COMPILED = ("fused_compiled", "fused_reduce_overhead")
GRAPHED = "fused_graphed"
COMPILED = (*COMPILED_PEERS, *FUSED_COMPILED)
CAM_LIBRARIES = ("grad_cam", "captum", "torchcam")
PROVIDERS = ("memcpy", "eager", "fused", "fused_modular", *COMPILED, GRAPHED, *CAM_LIBRARIES)


class Case(NamedTuple):
    """Features A of one size, type and memory layout."""

    n: int
    c: int
    h: int
    w: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "nchw"

    @property
    def positions(self) -> int:
        return self.h * self.w

    @property
    def bytes(self) -> int:
        """bytes(A) = N C H W itemsize"""
        return self.n * self.c * self.positions * self.dtype.itemsize

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        size = "x".join(map(str, (self.n, self.c, self.h, self.w)))
        return f"{size}-{self.type_name}-{self.layout}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The inverse of `str`, as in "32x2048x14x14-bfloat16-nchw".  Type and layout are optional."""
        size, *rest = text.split("-")
        parts = size.split("x")
        numbers = [int(x) for x in parts] if all(x.isdecimal() for x in parts) else []
        type_name, layout = [*rest, *("bfloat16", "nchw")[len(rest) :]][:2]
        dtype = getattr(torch, type_name, None)
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if len(numbers) != 4 or len(rest) > 2 or not is_float or layout not in LAYOUTS:
            raise ValueError(
                f"a case must be NxCxHxW or NxCxHxW-TYPE-LAYOUT, with a layout from {LAYOUTS}; got {text!r}"
            )
        return cls(*numbers, dtype, layout)


class Run(NamedTuple):
    """One provider on one pass of one case."""

    case: Case
    run: str
    provider: str

    def __str__(self) -> str:
        return f"{self.case}-{self.run}-{self.provider}"


MAPS = {  # the network whose last map has this shape
    (2048, 14, 14): "ResNet-50 at 448",
    (2048, 7, 7): "ResNet-50 at 224",
    (512, 28, 28): "VGG-16 at 448, before its last pooling",
    (512, 14, 14): "VGG-16 at 448",
    (1280, 14, 14): "EfficientNet at 448",
    (1024, 32, 32): "ViT-L, 1024 tokens",
}
BATCHES = (32, 128, 256)


def gpu_cases(batches: tuple[int, ...] = BATCHES, dtypes: tuple[torch.dtype, ...] = ()) -> list[Case]:
    return [
        Case(n, *shape, dtype, layout)
        for dtype in dtypes or (torch.bfloat16, torch.float32)
        for shape in MAPS
        for n in batches
        for layout in (("nlc",) if shape[0] == 1024 else ("nchw", "channels_last"))
    ]


def gpu_full() -> Iterator[Run]:
    """Every case, pass and provider.  They take some hours, most of which the compiler takes."""
    for case in gpu_cases():
        for run in PASSES:
            yield from (Run(case, run, provider) for provider in providers(run))
    for case in gpu_cases((1,)):
        yield from (Run(case, "fwd", provider) for provider in providers("fwd"))


def gpu_default() -> Iterator[Run]:
    """A selection for nine minutes.  The most important runs come first, the compiler's longest search last.

    Runs beyond the time budget are skipped.  Compiled peers run on a few cases only.  `--full` runs all of
    them.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    resnet = {n: Case(n, 2048, 14, 14) for n in (1, *BATCHES)}
    plain = ("memcpy", "eager", "fused", "fused_modular")
    both = ("compiled", "fused_compiled")
    graphs = ("fused_reduce_overhead", "compiled_reduce_overhead")
    rest = [case for case in gpu_cases(dtypes=(bf16,)) if case not in resnet.values()]
    at_128 = [case for case in rest if case.n == 128]
    elsewhere = [resnet[128]._replace(layout="channels_last"), Case(128, 512, 28, 28),
                 Case(128, 1024, 32, 32, layout="nlc"), Case(128, 2048, 7, 7)]  # fmt: skip
    fp32_cases = [Case(n, 2048, 14, 14, fp32) for n in (128, 32)]
    wanted: list[tuple[Case, str, tuple[str, ...]]] = [
        (resnet[n], "step", (*plain, *both)) for n in (128, 32)
    ]
    wanted += [(resnet[32], "beta", ("eager", "fused", "fused_reduce_overhead", *CAM_LIBRARIES))]
    wanted += [(resnet[256], "step", plain)]
    wanted += [(case, "step", plain) for case in at_128]
    wanted += [(resnet[n], "step", (*graphs, GRAPHED, "compiled_closed_form")) for n in (32, 128)]
    wanted += [(case, "step", both) for case in elsewhere]
    wanted += [(case, "step", plain) for case in (*rest, *fp32_cases)]
    wanted += [
        (case, run, ("eager", "fused")) for case in (resnet[128], *at_128) for run in ("fwd", "fwd_beta")
    ]
    wanted += [(case, "fwd", ("eager", "fused")) for case in gpu_cases((1,), (bf16,))]
    wanted += [(case, "step", both) for case in (resnet[256], fp32_cases[0], *at_128)]
    wanted += [(resnet[128], run, both) for run in ("fwd", "fwd_beta")]
    wanted += [(resnet[1], "fwd", (*both, *graphs)), (resnet[32], "beta", both)]
    wanted += [(case, "step", ("compiled_closed_form",)) for case in at_128]
    wanted += [(resnet[n], "step", ("compiled_max_autotune",)) for n in (128, 32)]
    for case, run, names in wanted:
        yield from (Run(case, run, name) for name in names)


def cpu_default() -> Iterator[Run]:
    """Small maps in float32.  Few cases are compiled, because that takes half a minute on two cores."""
    f32 = torch.float32
    plain, compiled = ("eager", "fused"), ("compiled", "fused_compiled")
    efficientnet, resnet = Case(32, 1280, 7, 7, f32), Case(16, 2048, 14, 14, f32)
    wanted = [
        (case, "step", (*plain, "fused_modular", *compiled, "memcpy")) for case in (efficientnet, resnet)
    ]
    wanted += [(resnet, "fwd_beta", (*plain, *compiled)), (resnet, "fwd", plain)]
    wanted += [(resnet, "beta", (*plain, *CAM_LIBRARIES))]
    wanted += [
        (case, "step", plain) for case in (resnet._replace(layout="channels_last"), resnet._replace(n=4))
    ]
    wanted += [(resnet._replace(n=1), "fwd", (*plain, *compiled))]
    for case, run, names in wanted:
        yield from (Run(case, run, name) for name in names)


CPU_LEFT_OUT = (
    "most compiled peers: they take half a minute each, so only two guided steps and two forwards are timed",
    "the paper's batch sizes, bfloat16 and tokens: they are too large for a CPU",
    "torch.compile's max-autotune-no-cudagraphs and reduce-overhead: a CPU's default, or slower to build",
    "compiled_closed_form: on a CPU it is the same as fused_compiled",
    "cold caches, CUDA graphs (with fused_graphed), host time and launches: a CPU times one warm buffer",
    "energy: only a GPU has the counter",
)


def providers(run: str) -> tuple[str, ...]:
    """The providers that compete in a pass."""
    left_out = {"step": CAM_LIBRARIES, "beta": ("memcpy", "fused_modular", GRAPHED)}
    without = left_out.get(run, (*CAM_LIBRARIES, "fused_modular", GRAPHED))
    return tuple(name for name in PROVIDERS if name not in without)
