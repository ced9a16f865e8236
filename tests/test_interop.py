"""The head inside common wrappers: DDP, FSDP2, checkpointing, copies, SyncBatchNorm."""

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ggam_fast import GGAMHead, GGAMLoss
from ggam_fast.classifier.layers import known_layers
from ggam_fast.functional import fused_ggam_loss, ggam_attention
from ggam_fast.reference import GGAMHeadReference
from tests.head.heads import pooled_classifier
from tests.parity import (
    OPTIONS,
    C,
    K,
    N,
    assert_parity,
    combine,
    draws,
    features,
    gradients,
    hard_target,
    pair,
)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cam_detach", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, cam_detach: bool, own: bool, device: torch.device) -> None:
    """The recomputed head repeats its dropout mask and its Grad-CAM."""
    build_classifier = pooled_classifier if own else None
    head, _ = pair(
        device=device, hidden_size=10, drop_rate=0.3, cam_detach=cam_detach, build_classifier=build_classifier
    )
    target, base = hard_target(device), features(device)
    results = []
    for checkpointed in (False, True):
        module, x = copy.deepcopy(head).train(), base.clone().requires_grad_()
        torch.manual_seed(0)
        out = checkpoint(module, x, target, use_reentrant=reentrant) if checkpointed else module(x, target)
        combine(out).backward()
        named = {"features": x, **dict(module.named_parameters())}
        results.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()})
    assert_parity(results[1], results[0], 1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_penalty_inside_a_checkpoint(backend: str, device: torch.device) -> None:
    """Second derivatives where tensors are saved through hooks; one parameter is frozen."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    head = GGAMHead(C, K, rd_channels=4, hidden_size=0, backend=backend, device=device, dtype=dtype)
    head.fc1.bias.requires_grad_(False)
    x, target = features(device).to(dtype).requires_grad_(), hard_target(device)

    def penalised(x: Tensor) -> Tensor:
        loss = GGAMLoss()(head(x, target), target)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + gradient.square().sum()

    wanted = [x, *(p for p in head.parameters() if p.requires_grad)]
    found = torch.autograd.grad(checkpoint(penalised, x, use_reentrant=False), wanted)
    expected = torch.autograd.grad(penalised(x), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["none", "channel", "spatial", "channel_spatial"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_hook_may_change_the_gradient_in_place(
    attention: str, layout: torch.memory_format, device: torch.device
) -> None:
    head = GGAMHead(C, K, attention=attention, device=device, dtype=torch.float64).eval()
    x = features(device).contiguous(memory_format=layout).requires_grad_()
    target = hard_target(device)
    (expected,) = torch.autograd.grad(GGAMLoss()(head(x, target), target), x)
    y = x * 1
    y.register_hook(lambda gradient: gradient.mul_(2))
    GGAMLoss()(head(y, target), target).backward()
    torch.testing.assert_close(x.grad, 2 * expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "safe_load"])
def test_copies(how: str, device: torch.device, tmp_path: Path) -> None:
    head, _ = pair(device=device, hidden_size=10)
    x, target = features(device), hard_target(device)
    head.train()(x, target)
    head.eval()
    expected = head(x, target)
    if how == "deepcopy":
        twin = copy.deepcopy(head)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(head))
    else:
        twin = GGAMHead(C, K, rd_channels=6, hidden_size=10).to(device, torch.float64).eval()
        if how == "state_dict":
            buffer = io.BytesIO()
            torch.save(head.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        else:
            torch.save(head.state_dict(), tmp_path / "head.pt")
            state = torch.load(tmp_path / "head.pt", map_location=device, weights_only=True)
        twin.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(twin(x, target), expected, strict=True))
    with torch.no_grad():
        twin.fc1.weight.zero_()
    assert head.fc1.weight.count_nonzero() > 0


@pytest.mark.parametrize("hidden_size", [0, 8])
@pytest.mark.parametrize("pool_type", ["avg", "max"])
def test_gradients_of_single_images_by_vmap(pool_type: str, hidden_size: int, device: torch.device) -> None:
    head = GGAMHead(C, K, pool_type=pool_type, hidden_size=hidden_size, device=device, dtype=torch.float64)
    head.eval()
    x, target = features(device), hard_target(device)

    def loss(image: Tensor, label: Tensor) -> Tensor:
        image, label = image.unsqueeze(0), label.unsqueeze(0)
        return GGAMLoss()(head(image, label), label)

    found = torch.func.vmap(torch.func.grad(loss))(x, target)
    expected = torch.stack([torch.func.grad(loss)(*pair) for pair in zip(x, target, strict=True)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pool_type", ["avg", "max", "flatten", ""])
def test_vectorised_jacobian(pool_type: str, device: torch.device) -> None:
    x = features(device)[:1, :3, :2]

    def attention(z: Tensor) -> Tensor:
        return ggam_attention(z, attention="spatial", pool_type=pool_type).spatial_attention

    found, expected = (torch.autograd.functional.jacobian(attention, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, expected)


def test_sync_batch_norm_goes_through_autograd(device: torch.device) -> None:
    """Its statistics are of all processes: the closed form of local ones would be wrong, and is not used."""
    head, _ = pair(device=device, hidden_size=10)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
    assert isinstance(synced.classifier[0], nn.SyncBatchNorm)
    assert known_layers(head.classifier, head.drop) is not None
    assert known_layers(synced.classifier, synced.drop) is None
    x, target = features(device), hard_target(device)
    assert_parity(synced.eval()(x, target), head.eval()(x, target), 1e-10)


def test_subclasses_have_no_closed_form(device: torch.device) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    own = Doubled(C, K)
    assert known_layers(own, nn.Dropout(0.0)) is None
    head, reference = pair(device=device, build_classifier=lambda: Doubled(C, K))
    x, target = features(device), hard_target(device)
    assert_parity(head(x, target), reference(x, target), 1e-10)


def test_parametrized_weights(device: torch.device) -> None:
    """Weight norm on the channel MLP and on the classifier."""
    head, reference = pair(device=device, hidden_size=0)
    for module in (head, reference):
        for layer in (module.fc1, module.fc2, module.classifier):
            nn.utils.parametrizations.weight_norm(layer)
    x, target = features(device), hard_target(device)
    found = []
    for module in (head, reference):
        leaf = x.clone().requires_grad_()
        out = module(leaf, target)
        found.append({**out._asdict(), **gradients(combine(out), leaf, module)})
    assert_parity(*found, 1e-10)


# Processes


def build() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Model(GGAMHead(C, K, rd_channels=6, hidden_size=0, cam_norm="standardized")).double()
    return model, torch.randn(2 * N, 3, 4, 4, dtype=torch.float64), torch.randint(K, (2 * N,))


class Model(nn.Module):
    """A convolution, the head and the loss."""

    def __init__(self, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 1), nn.ReLU())
        self.head, self.criterion = head, GGAMLoss(0.5)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.head(self.backbone(images), target), target)


def start(rank: int, world: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)


def ddp_worker(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    start(rank, world, directory)
    model, images, target = build()
    model = nn.parallel.DistributedDataParallel(model)
    model(images[rank::world], target[rank::world]).backward()
    if rank == 0:
        grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        torch.save(grads, Path(directory) / "grads.pt")
    dist.barrier()
    dist.destroy_process_group()


def fsdp_worker(rank: int, world: int, directory: str, *layers: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    start(rank, world, directory)
    mesh = init_device_mesh("cpu", (world,))
    model, images, target = build()
    for name in layers:
        fully_shard(model.head.get_submodule(name), mesh=mesh)
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(images[rank::world], target[rank::world]).backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    if rank == 0:
        torch.save(grads, Path(directory) / "grads.pt")
    dist.barrier()
    os._exit(0)  # torch's own exit may end in "terminate called without an active exception" (torch 2.14)


def fsdp_layers_worker(rank: int, world: int, directory: str) -> None:
    """fc1 and fc2 sharded by themselves are called, and so gather their weights."""
    fsdp_worker(rank, world, directory, "fc1", "fc2")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("worker", [ddp_worker, fsdp_worker, fsdp_layers_worker])
def test_two_processes_get_the_gradients_of_one(worker: Any, tmp_path: Path) -> None:
    """One ordinary autograd node: every gradient is averaged over the processes, the guidance's included."""
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2, join=True)
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    model, images, target = build()
    model(images, target).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert_parity(found, expected, 1e-10)  # type: ignore[arg-type]


FORWARD = {
    "attention": OPTIONS["attention"], "spatial_norm": OPTIONS["spatial_norm"], "cam_at": OPTIONS["cam_at"],
    "cam_class": OPTIONS["cam_class"], "cam_norm": OPTIONS["cam_norm"], "cam_detach": (True, False),
    "pool_type": ("avg", "max"), "hidden_size": (0, 8),
}  # fmt: skip


@pytest.mark.parametrize("options", list(draws(FORWARD, 12, "forward mode")), ids=str)
def test_forward_mode(options: dict[str, Any], device: torch.device) -> None:
    """<dy, J dx> is <J^T dy, dx>, of logits and of the loss in both forms."""
    head, _ = pair(device=device, **options)
    head.eval()
    x, target = features(device), hard_target(device)
    tangent = torch.randn_like(x)

    def logits(x: Tensor) -> Tensor:
        return head(x)

    def guided(x: Tensor) -> Tensor:
        return GGAMLoss(0.5)(head(x, target), target)

    def fused(x: Tensor) -> Tensor:
        return fused_ggam_loss(head, x, target, guidance_weight=0.5).loss

    for function in (logits, guided, fused):
        y, dy = torch.func.jvp(function, (x,), (tangent,))
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        torch.testing.assert_close(y.detach(), out.detach())
        seed = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, leaf, seed)
        torch.testing.assert_close((seed * dy).sum().detach(), (gradient * tangent).sum())


@pytest.mark.parametrize("cam_detach", [True, False])
def test_hessian(cam_detach: bool, device: torch.device) -> None:
    """Forward over reverse, as torch.func.hessian does it, against reverse over reverse."""
    head = GGAMHead(4, 3, rd_channels=2, hidden_size=0, cam_detach=cam_detach, device=device).double().eval()
    x, target = torch.rand(2, 4, 2, 2, device=device).double(), torch.tensor([0, 2], device=device)

    def loss(x: Tensor) -> Tensor:
        return GGAMLoss()(head(x, target), target)

    found = torch.func.hessian(loss)(x)
    torch.testing.assert_close(found, torch.func.jacrev(torch.func.jacrev(loss))(x))


def test_what_has_no_forward_mode_says_so(device: torch.device) -> None:
    own = nn.Sequential(nn.Linear(C, 9), nn.Tanh(), nn.Linear(9, K))
    head = GGAMHead(C, K, classifier=own).to(device, torch.float64)
    x, target = features(device), hard_target(device)
    with pytest.raises(
        NotImplementedError, match=r"custom classifier.*no forward mode.*without target, or use"
    ):
        torch.func.jvp(lambda x: head(x, target).guidance_loss, (x,), (x,))
    found = torch.func.jvp(head, (x,), (x,))[1]
    expected = torch.autograd.functional.jvp(head, x, x)[1]  # by reverse mode, twice
    torch.testing.assert_close(found, expected)


class Guided(nn.Module):
    """A model as a user writes it: logits and the guidance of a head behind a layer."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, C, 1), head

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = self.fc(self.conv(images), target)
        return out.logits, out.guidance_loss


class Plain(Guided):
    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(self.conv(images)).relu()


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize("options", [{}, {"classifier": nn.Linear(C, K)}], ids=["default", "own"])
def test_a_leaf_of_symbolic_trace(
    kind: type[nn.Module], options: dict[str, Any], device: torch.device
) -> None:
    head = kind(C, K, **options)
    images, target = torch.rand(N, 3, 4, 4, device=device), hard_target(device)
    for model, given in ((Plain(head), (images,)), (Guided(head), (images, target))):
        model.to(device).eval()
        traced = torch.fx.symbolic_trace(model)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["conv", "fc"]
        torch.testing.assert_close(traced(*given), model(*given), rtol=0, atol=0)
        traced.delete_all_unused_submodules()
        assert traced.fc is model.fc
        pickle.loads(pickle.dumps(traced))


def test_a_head_alone_is_no_graph(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"GGAMHead is a leaf of torch.fx .*trace a module that holds it"):
        torch.fx.symbolic_trace(GGAMHead(C, K, device=device))


def test_torchvisions_feature_extractor(device: torch.device) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Plain(GGAMHead(C, K)).to(device).eval()
    train, evaluation = extraction.get_graph_node_names(model)
    assert train == evaluation == ["images", "conv", "fc", "relu"]
    images = torch.rand(N, 3, 4, 4, device=device)
    found = extraction.create_feature_extractor(model, {"conv": "map", "fc": "logits"})(images)
    torch.testing.assert_close(found["map"], model.conv(images))
    torch.testing.assert_close(found["logits"], model.fc(model.conv(images)))
