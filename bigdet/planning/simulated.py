"""A training step on tensors without memory: what it would allocate on a GPU, and compute.

torch's fake tensors run the detector's own operations, forward, backward and optimizer, with shapes
and types but no numbers; each tensor takes a block of `CachingAllocator`, until nothing refers to
it. Nothing is estimated here but what depends on numbers: a mask or keypoint head gets as many
regions on objects as it ever may, and regions are divided equally among the levels of a pyramid.
Fake tensors are on the CPU, since torch has no backward pass of fake CUDA tensors without a GPU;
the code takes the way of a GPU (`ops.devices`), and attention that of CUDA's fused kernels.

Not seen: what kernels allocate themselves (workspaces of cuDNN and cuBLAS, sorting), and
``model.compile``, which takes less, and ``device.cuda_graphs``, which keeps more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bigdet.config.engine import Precision
from bigdet.config.model import has_keypoints, has_masks, used
from bigdet.config.resize import is_square, largest_plan
from bigdet.config.run import RunConfig, phase_model
from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.models.rcnn import RCNN
from bigdet.ops.devices import as_on_gpu
from bigdet.ops.sizes import canvas_size
from bigdet.pieces.building import materialize, place
from bigdet.planning.allocator import CachingAllocator
from bigdet.structures import Batch, Masks, Targets
from bigdet.training import optim
from bigdet.training.phases import build_empty
from bigdet.training.sizes import FP32_BYTES

aten = torch.ops.aten
_LEVELS = 4  # from which regions are pooled
_PART = 6  # the canvas holds this many bitmaps of an object
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """What one micro-batch and one optimizer step take on one GPU that shares nothing.

    Attributes:
        forward: largest number of bytes allocated in the forward pass.
        backward: the same in the backward pass.
        optimizer: the same in the optimizer step.
        reserved: bytes that the allocator has taken from the GPU after two steps.
        weights: bytes of parameters and buffers.
        gradients: bytes.
        state: bytes of the optimizer and of the moving average.
        largest_unit: numbers in the weights that FSDP2 gathers together, the largest of these.
        largest_tensor: numbers in the largest weight.
        costs: floating-point operations and bytes read and written by each kernel.
    """

    forward: int
    backward: int
    optimizer: int
    reserved: int
    weights: int
    gradients: int
    state: int
    largest_unit: int
    largest_tensor: int
    costs: list[tuple[float, float]]

    @property
    def peak(self) -> int:
        """Bytes allocated at the worst moment."""
        return max(self.forward, self.backward, self.optimizer)


def canvas_of(config: RunConfig, phase: str) -> tuple[int, int]:
    """Return height and width of the largest canvas that a phase trains on, pixels."""
    resize = config.phases[phase].resize
    if is_square(resize):
        return resize.size, resize.size
    return canvas_size([largest_plan(resize)])


def simulate(
    config: RunConfig,
    phase: str,
    num_classes: int,
    num_objects: int,
    way: TorchFunctionMode | None = None,
) -> Step:
    """Run two steps of a phase without memory; the second is what counts.

    Args:
        config: resolved.
        phase: a key of ``config.phases``.
        num_classes: K.
        num_objects: objects of each image.
        way: replaces functions of torch; None: attention by fused kernels.
    """
    settings = config.phases[phase]
    model = dataclasses.replace(config.model, compile=False)
    device = dataclasses.replace(config.device, cuda_graphs=False)
    config = dataclasses.replace(config, model=model, device=device)
    detector = build_empty(config, phase, [str(label) for label in range(num_classes)])
    return run_steps(
        detector,
        functools.partial(make_batch, config, phase, num_objects),
        functools.partial(optim.build_optimizer, phase=settings),
        config.engine.precision,
        settings.images_per_gpu * _most_positives(config, phase),
        with_average=settings.ema is not None,
        way=way,
    )


def run_steps(
    detector: Detector,
    make: Callable[[], Batch],
    make_optimizer: Callable[[nn.Module], Optimizer],
    precision: Precision,
    answer: int,
    *,
    with_average: bool = False,
    way: TorchFunctionMode | None = None,
) -> Step:
    """Train a detector for two steps without memory; it is of no use afterwards.

    Args:
        detector: in training mode, with what is trained.
        make: gives the micro-batch.
        make_optimizer: gives the optimizer.
        precision: of convolutions and matrix products.
        answer: number that the host gets for each that it asks the device for.
        with_average: there is a moving average of the weights.
        way: replaces functions of torch; None: attention by fused kernels.
    """
    memory = CachingAllocator()
    watch = _Watch(memory, answer)
    modes = FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(), way or FusedAttention(), watch
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        _make_fake(detector)
        weights = memory.allocated
        if isinstance(detector, RCNN):
            propose = functools.partial(detector.rpn.propose, suppress=_keep_all)
            detector.rpn.propose = propose  # type: ignore[method-assign]
        optimizer = make_optimizer(detector)
        trained = [p for p in detector.parameters() if p.requires_grad]
        average = [torch.empty_like(p) for p in trained] if with_average else []
        total, batch = TotalLoss(detector, precision, _CPU), make()
        peaks = (0, 0, 0)
        for _ in range(2):
            peaks = _step(total, batch, optimizer, memory, watch)
        state = [
            value
            for of_parameter in optimizer.state.values()
            for value in of_parameter.values()
            if isinstance(value, Tensor)
        ]
    return Step(
        *peaks,
        reserved=memory.reserved,
        weights=weights,
        gradients=sum(p.numel() for p in trained) * FP32_BYTES,
        state=sum(value.nbytes for value in [*state, *average]),
        largest_unit=_largest_unit(detector),
        largest_tensor=max(p.numel() for p in detector.parameters()),
        costs=watch.costs,
    )


def _step(
    total: TotalLoss, batch: Batch, optimizer: Optimizer, memory: CachingAllocator, watch: _Watch
) -> tuple[int, int, int]:
    """Take a step; return the peaks of forward pass, backward pass and update."""
    watch.costs = []
    memory.take_peak()
    loss = total(batch)[0]
    forward = memory.take_peak()
    # As torch.autograd.backward, which would leave `way` out of what is run again in it.
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), True, True
    )
    del loss
    backward = memory.take_peak()
    optimizer.step()
    update = memory.take_peak()
    optimizer.zero_grad()
    return forward, backward, update


def _most_positives(config: RunConfig, phase: str) -> int:
    """Return how many regions of an image may lie on objects."""
    roi = phase_model(config, phase).roi
    return 0 if roi is None else int(roi.rois_per_image * roi.positive_fraction)


def _make_fake(detector: nn.Module) -> None:
    """Give parameters and buffers fake memory, in the layout that ZeRO-0 gives them."""

    def make(value: Tensor) -> Tensor:
        layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
        return torch.empty(value.shape, dtype=value.dtype, memory_format=layout)

    place(detector, lambda value: value if value.is_meta else make(value))
    materialize(detector, make)
    for part in detector.modules():
        for name, value in part.named_buffers(recurse=False):
            if value.is_meta:
                part._buffers[name] = make(value)


def _largest_unit(detector: Detector) -> int:
    """Count the weights of the largest unit, or of what is in none."""
    sizes, rest = [], {id(p): p.numel() for p in detector.parameters()}
    for unit in detector.units:
        own = {id(p): p.numel() for part in unit for p in part.parameters()}
        sizes.append(sum(own.values()))
        for key in own:
            rest.pop(key, None)
    return max([sum(rest.values()), *sizes])


def make_batch(config: RunConfig, phase: str, num_objects: int) -> Batch:
    """Make a batch of the largest canvas, of zeros."""
    settings, model = config.phases[phase], phase_model(config, phase)
    height, width = canvas_of(config, phase)
    images, total = settings.images_per_gpu, settings.images_per_gpu * num_objects

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    masks = keypoints = None
    if has_masks(model):
        bits = zeros(total * (height * width // _PART), dtype=torch.uint8)
        masks = Masks(bits, zeros(total + 1), zeros(total, 2), zeros(total, 2))
    if has_keypoints(model):
        keypoints = zeros(total, used(model.keypoint).num_keypoints, 3, dtype=torch.float32)
    pixels = zeros(images, 3, height, width, dtype=torch.uint8)
    return Batch(
        images=pixels.contiguous(memory_format=torch.channels_last),
        image_sizes=zeros(images, 2),
        original_sizes=zeros(images, 2),
        image_ids=zeros(images),
        weights=zeros(images, dtype=torch.float32),
        targets=Targets(
            boxes=zeros(total, 4, dtype=torch.float32),
            labels=zeros(total),
            is_crowd=zeros(total, dtype=torch.bool),
            offsets=zeros(images + 1),
            masks=masks,
            keypoints=keypoints,
            most=num_objects,
        ),
        seed=0,
    )


def _keep_all(boxes: Tensor, scores: Tensor, *_: Any) -> Tensor:
    """What suppression on a GPU allocates: a byte for each box."""
    return (scores > -torch.inf).to(torch.int8).bool()


class FusedAttention(TorchFunctionMode):
    """Attention as CUDA computes it: no matrix of all pairs is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run the memory-efficient kernel, as fused attention of torch's, under autocast."""
    assert not enable_gqa
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        q, k, v = (value.to(dtype) for value in (q, k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    is_kept = torch.is_grad_enabled() and any(value.requires_grad for value in (q, k, v))
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, is_kept, dropout_p, is_causal, scale=scale
    )[0]
    return out


class _Watch(TorchDispatchMode):
    """Gives each new tensor a block of memory, and counts what the kernels do.

    Attributes:
        costs: of the kernels of the last step.
    """

    def __init__(self, memory: CachingAllocator, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: list[tuple[float, float]] = []
        self._memory, self._answer = memory, answer
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:  # the host asks for a number
            return self._answer
        if func is aten.nonzero.default:
            rows = -(-args[0].numel() // _LEVELS)
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        is_new = [self._hold(tensor) for tensor in outputs]
        if any(is_new) or func._schema.is_mutable:
            self._count(func, args, kwargs or {}, result, inputs, outputs)
        return result

    def _hold(self, tensor: Tensor) -> bool:
        """Give a tensor's memory a block; return whether it had none."""
        memory = tensor.untyped_storage()
        if memory in self._known or not memory.nbytes() or tensor.is_meta:
            return False
        self._known.add(memory)
        block = self._memory.allocate(memory.nbytes())
        weakref.finalize(memory, self._memory.free, block).atexit = False
        return True

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        """Add the cost of a kernel."""
        packet = func._overloadpacket
        if packet in _WITHOUT_KERNEL:
            return
        count: Callable[..., float] | None = flop_registry.get(packet)
        flops = float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0
        if packet in (aten._embedding_bag, aten._embedding_bag_forward_only):
            table, index = args[:2]  # not the whole table, but a row for each number
            moved = index.numel() * table.shape[1] * table.itemsize + outputs[0].nbytes
        else:
            moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
        self.costs.append((flops, float(moved)))


_WITHOUT_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach}
