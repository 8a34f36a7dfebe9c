"""CUDA graphs: the launches of a function and of its backward pass, each replayed as one launch.

A GPU that is faster than its host waits for launches. What is computed in the same way for each
canvas of a size is launched once, recorded, and replayed at the same addresses from then on. This
does what ``torch.cuda.make_graphed_callables`` does, but gives out copies of the gradients: torch
gives out the memory that the next replay writes to, so that gradients that are added up over
micro-batches are wrong (pytorch/pytorch#181723). It also lets autocast cast a weight once for all
levels, as it does without graphs, and records a shape when it first comes.

What is recorded must not wait for the device, copy from the host, call a collective, or keep a
tensor for the next call that it computes anew for another shape. While a shape is recorded, the
warm-ups take as much memory again as the recording will keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM_UPS = 3
"""Runs before a recording, as in torch: libraries choose and compile kernels in them."""


class Graphs:
    """Records a function of tensors for each shape of them and type of autocast, and replays it.

    All recordings share their memory, which torch allows on one stream, so the backward pass of a
    call comes before the next call.

    Args:
        modules: whose parameters get gradients; these stay where they are in memory.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._num_calls = 0

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """Give what a function gives, for gradients of the parameters only.

        Args:
            function: of the inputs, which gives tensors and numbers in any nesting of pytrees; the
                same in all calls. Only its first call with inputs of a shape runs it.
            inputs: without gradients, on the GPU.
        """
        kind = inputs[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (*(value.shape for value in inputs), autocast)
        if key not in self._recordings:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            device = inputs[0].device
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with _aliases(self._modules) as trained:
                made = _Recording(function, inputs, trained, self._pool, self._stream)
            self._recordings[key] = made
        recording = self._recordings[key]
        self._num_calls += 1
        recording.take(inputs)
        outputs = _Replay.apply(self, recording, self._num_calls, *recording.parameters)
        return recording.arrange(outputs)

    def check_is_last(self, call: int) -> None:
        """Check that no later call has overwritten what the backward pass of this one needs."""
        assert call == self._num_calls, f"call {call} of {self._num_calls}"


@contextmanager
def _aliases(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Let modules have other parameters with the same memory; give those that are trained.

    An engine may keep the nodes of autograd that add up the gradients of its parameters, which wait
    for another stream: torch refuses to record them.
    """
    places = [
        (part, name, parameter)
        for module in modules
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    others = {p: nn.Parameter(p.detach(), p.requires_grad) for _, _, p in places}
    try:
        for part, name, parameter in places:
            part._parameters[name] = others[parameter]
        yield {p: other for p, other in others.items() if p.requires_grad}
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter


class _Recording:
    """The graphs of a forward and a backward pass, and the tensors that they read and write."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        trained: dict[nn.Parameter, nn.Parameter],
        pool: Any,
        stream: Any,
    ) -> None:
        self.parameters, self._aliases = list(trained), list(trained.values())
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._inputs = [value.clone() for value in inputs]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        device = inputs[0].device
        stream.wait_stream(torch.cuda.current_stream(device))
        # Threads that read data use CUDA meanwhile, so only this one must not do what is forbidden.
        options: Any = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
        with torch.random.fork_rng([device]):  # the first replay draws what a call would draw
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    ends = self._run(function)[1]
                    self._differentiate(ends, [torch.zeros_like(end) for end in ends])
                    del ends
            with torch.cuda.graph(self.forward, **options):
                leaves, ends = self._run(function)
            self.output_gradients = [torch.zeros_like(end) for end in ends]
            with torch.cuda.graph(self.backward, **options):
                self.gradients = self._differentiate(ends, self.output_gradients)
        self._aliases.clear()
        torch.clear_autocast_cache()
        torch.cuda.current_stream(device).wait_stream(stream)
        # Without the autograd graph, whose nodes would belong to the stream of the recording.
        self.outputs = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        self.is_trained = [leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def _run(self, function: Callable[..., Any]) -> tuple[list[Any], list[Tensor]]:
        """Call the function; give all that it gives, and the tensors that have gradients."""
        torch.clear_autocast_cache()
        leaves, self._structure = tree_flatten(function(*self._inputs))
        return leaves, [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def _differentiate(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Give the gradients of the parameters; None where the outputs do not depend on one."""
        with torch.autocast(outputs[0].device.type, enabled=False):  # as where engines call it
            return list(torch.autograd.grad(outputs, self._aliases, gradients, allow_unused=True))

    def take(self, inputs: Sequence[Tensor]) -> None:
        """Copy the inputs to where the graph reads them."""
        addresses = [parameter.data_ptr() for parameter in self.parameters]
        assert addresses == self._addresses, "weights were moved after they were recorded"
        torch._foreach_copy_(self._inputs, list(inputs))

    def arrange(self, outputs: Sequence[Tensor]) -> Any:
        """Put outputs into the structure that the function gave."""
        left = iter(outputs)
        leaves = [
            next(left) if is_tensor else other
            for is_tensor, other in zip(self._is_tensor, self._others, strict=True)
        ]
        return tree_unflatten(leaves, self._structure)


class _Replay(torch.autograd.Function):
    """A call of a recorded function; its parameters are given for autograd alone."""

    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, recording: _Recording, call: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.graphs, ctx.recording, ctx.call = graphs, recording, call
        ctx.set_materialize_grads(False)
        recording.forward.replay()
        outputs = [output.detach() for output in recording.outputs]
        pairs = zip(outputs, recording.is_trained, strict=True)
        ctx.mark_non_differentiable(*[output for output, is_trained in pairs if not is_trained])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.graphs.check_is_last(ctx.call)
        recording = ctx.recording
        pairs = zip(gradients, recording.is_trained, strict=True)
        given = [gradient for gradient, is_trained in pairs if is_trained]
        for place, gradient in zip(recording.output_gradients, given, strict=True):
            place.zero_() if gradient is None else place.copy_(gradient)
        recording.backward.replay()
        found = [gradient for gradient in recording.gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in found]
        torch._foreach_copy_(copies, found)
        left = iter(copies)
        own = [None if gradient is None else next(left) for gradient in recording.gradients]
        return None, None, None, *own
