"""Inductor's GPU code without a GPU: graphs traced on the CPU and lowered for fake tensors of an H100."""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    L2_cache_size=50 << 20, shared_memory_per_multiprocessor=233472, shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152, gcnArchName="sm_90",
)  # fmt: skip


def graphs(loss: Callable[..., Tensor], *inputs: Tensor) -> list[GraphModule]:
    """The forward and, where there is one, the backward that Inductor is given; nothing is computed."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    found: list[GraphModule] = []

    def keep(graph: GraphModule, *_: Any, **__: Any) -> Any:
        found.append(graph)
        values = [x.meta["val"] if isinstance(x, Node) else x for x in graph.graph.output_node().args[0]]
        blanks = [partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor)
                  else partial(int, x) if isinstance(x, int) else lambda: None for x in values]  # fmt: skip
        return make_boxed_func(lambda *_: [make() for make in blanks])

    torch._dynamo.reset()
    found_loss = torch.compile(
        loss, fullgraph=True, backend=lambda graph, given: compile_fx(graph, given, inner_compile=keep)
    )(*inputs)
    if found_loss.requires_grad:
        found_loss.backward()
    return found


@contextlib.contextmanager
def _an_h100() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    capable = {"get_compute_capability": 90, "is_triton_capable": True, "raise_if_triton_unavailable": None}
    common = {"get_device_properties": _H100, "current_device": 0}
    cuda = {"device_count": 1, "get_device_capability": (9, 0), "get_device_name": _H100.name}
    answers: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {**common, **cuda, "is_available": True, "_lazy_init": None}),
        (CudaInterface, {**common, **capable, "is_available": True}),
        (CudaInterface.Worker, common),
    ]
    active = mock.MagicMock()
    active.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    with contextlib.ExitStack() as stack:
        for place, given in answers:
            for name, answer in given.items():
                there = mock.MagicMock(return_value=answer)
                stack.enter_context(mock.patch.object(place, name, there, create=True))
        stack.enter_context(mock.patch.object(driver, "_active", active))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        yield


def code(graph: GraphModule) -> str:
    """What Inductor writes for the graph on cuda:0."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda:0"))
    with _an_h100(), config.patch(compile_threads=1, force_disable_caches=True):
        mode, values = FakeTensorMode(), [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
        with mode:
            given = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in values]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*given)
        out = graph.graph.output_node()
        found = [x.meta["val"] if isinstance(x, Node) else None for x in out.args[0]]
        out.meta["original_output_strides"] = [x.stride() if isinstance(x, Tensor) else None for x in found]
        with V.set_fake_mode(mode):
            post_grad_passes(graph, False)
            lowering = GraphLowering(graph, example_inputs=given)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), DebugContext():
                lowering.run(*given)
                text = lowering.codegen()[0]
    return text if isinstance(text, str) else text.value


class Launch(NamedTuple):
    """One kernel of Inductor's, or a call of an operator: which buffers it loads (as often as it does) and
    stores."""

    name: str
    loads: list[str]
    stores: list[str]


class Program(NamedTuple):
    """What Inductor's code does, in order."""

    launches: list[Launch]
    sizes: dict[str, int]  # elements of each buffer and input

    def of_size(self, size: int) -> list[Launch]:
        """The launches that touch buffers of at least that many elements, with those alone."""
        large = {name for name, n in self.sizes.items() if n >= size}
        kept = [Launch(x.name, *([b for b in bs if b in large] for bs in x[1:])) for x in self.launches]
        return [x for x in kept if x.loads or x.stores]


def _elements(shape: str) -> int:
    return torch.Size(int(n) for n in shape.split(",") if n.strip()).numel()


def program(graph: GraphModule) -> Program:
    """Read `code`."""
    text = code(graph)
    kernels = re.findall(r"^def (triton_\w+)\((.*?)\):\n(.*?)^'''", text, re.M | re.S)
    bodies = {name: (parameters.split(", "), body) for name, parameters, body in kernels}
    sizes = {n.name: n.meta["val"].numel() for n in graph.graph.find_nodes(op="placeholder")}
    launches = []
    for line in text[text.index("def call(") :].splitlines():
        line = re.sub(r"reinterpret_tensor\((\w+), .*?\), .*?\), \d+\)", r"\1", line.strip())
        if made := re.match(r"(\w+) = empty_strided_cuda\(\(([\d, ]*)\)", line):
            sizes[made[1]] = _elements(made[2])
        elif said := re.match(r"assert_(?:size_stride|tensor_metadata)\((\w+), \(([\d, ]*)\)", line):
            sizes[said[1]] = _elements(said[2])
        elif again := re.match(r"(\w+) = (\w+);", line):  # a buffer used again
            sizes[again[1]] = sizes.get(again[2], 0)
        elif run := re.match(r"(triton_\w+)\.run\((.*), stream=", line):
            parameters, body = bodies[run[1]]
            given = list(zip(parameters, run[2].split(", "), strict=False))
            loads = [a for p, a in given for _ in range(body.count(f"tl.load({p} "))]
            launches.append(Launch(run[1], loads, [a for p, a in given if f"tl.store({p} " in body]))
        elif call := re.match(r"\w+ = torch\.ops\.(\w+\.\w+)\.\w+\((.*?)[\[\"]", line):
            launches.append(Launch(call[1], re.findall(r"[a-z]\w*", call[2]), []))
    return Program(launches, sizes)
