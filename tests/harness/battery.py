"""The battery every op passes: one op, any back end.

A test file describes its op as an :class:`OpUnderTest` and subclasses :class:`Battery`; the back
ends come from ``--backends``.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import ops
from tests.harness.compile_battery import CompileBattery
from tests.harness.op_under_test import (
    DTYPES,
    aligned_and_not,
    applies,
    backward,
    close,
    leaves,
    several,
)

# The same values in another layout, for a tensor of any shape.
LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "inside a wider one": lambda t: (
        torch.cat([t, t, t], -1).tensor_split(3, -1)[1] if t.dim() else t
    ),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


class Battery(CompileBattery):
    """Subclass with ``op = OpUnderTest(...)``, and ``backends`` if the op has not all of them."""

    layout_dtypes = (torch.float64, torch.float32)

    # ---- values and gradients against the naive reference ----------------------------------------

    def agree(self, inputs, keywords, needed=None):
        """Results and gradients agree with the reference computed in float64."""
        dtype = inputs[0].dtype
        kind = torch.float32 if self.op.widens and dtype.itemsize == 2 else dtype
        ours = leaves(inputs, needed)
        theirs = [t.detach().double().requires_grad_(t.requires_grad) for t in ours]
        results, expected = self.op.results(ours, keywords), self.op.naive(theirs, keywords)
        grads = []
        for result, reference in zip(results, expected, strict=True):
            assert result.dtype == (kind if result.is_floating_point() else reference.dtype)
            assert result.shape == reference.shape
            assert result.requires_grad == reference.requires_grad
            close(result, reference, kind)
            grads.append(torch.randn_like(reference).to(kind) if reference.requires_grad else None)
        backward(results, grads)
        backward(expected, [grad if grad is None else grad.double() for grad in grads])
        for name, mine, reference in zip(self.op.names, ours, theirs, strict=True):
            # Zeros for an empty input too, because None may mean that a gradient is lost.
            assert (mine.grad is not None) == mine.requires_grad, name
            if mine.grad is not None:
                assert mine.grad.dtype == dtype
                close(mine.grad, reference.grad, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, backend, device, dtype):
        for shape, keywords in itertools.product(self.op.shapes, self.op.variants):
            self.agree(self.inputs(device, dtype, shape), keywords)

    @applies(lambda op, backend: op.launches is not None)
    def test_every_launch_shape(self, backend, device):
        """With and without wide loads, which are of more elements in a half precision."""
        for dtype, keywords in (
            (torch.float32, self.op.variants[-1]),
            (torch.bfloat16, self.op.variants[0]),
        ):
            # All at once, so that they do not depend on the numbers that the checks draw.
            for plain in list(self.op.launches(dtype, device)):
                for inputs in aligned_and_not(plain):
                    self.agree(inputs, keywords)

    def test_every_requires_grad_subset(self, backend, device):
        for needed in itertools.product((True, False), repeat=len(self.op.names)):
            for keywords in self.op.variants:
                self.agree(self.inputs(device), keywords, needed)

    def test_layouts(self, backend, device):
        """Transposed, strided, offset and overlapping inputs, all and one by one."""
        layouts = {**LAYOUTS, "one shared row": lambda t: t[:1].expand(t.shape)}
        for dtype in self.layout_dtypes:
            plain = self.inputs(device, dtype, self.op.shapes[-1])
            for lay in layouts.values():
                self.agree([lay(t) for t in plain], self.op.variants[0])
                for place in range(len(plain)):
                    one = [lay(t) if i == place else t for i, t in enumerate(plain)]
                    self.agree(one, self.op.variants[0])

    def test_conjugated_and_negated_views(self, backend, device):
        """A lazy negative view is what it stands for."""
        inputs = self.inputs(device)
        lazy = [torch.complex(t, -t).conj().imag for t in inputs]
        assert lazy[0].is_neg()
        keywords = self.op.variants[0]
        for one, other in zip(
            self.op.results(lazy, keywords), self.op.naive(inputs, keywords), strict=True
        ):
            close(one, other, torch.float64)

    @pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
    def test_tensors_that_are_not_dense(self, backend, device):
        """Each in turn: an error of ours, not one from within torch."""
        plain = self.inputs(device)
        for place, tensor in enumerate(plain):
            nested = torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged)
            for other in (tensor.to_sparse(), torch.nested.nested_tensor([tensor]), nested):
                inputs = [other if i == place else t for i, t in enumerate(plain)]
                with pytest.raises(ops.ArgumentError, match="must be a dense tensor, got"):
                    self.op.results(inputs, self.op.variants[0])

    def test_dtensors(self, backend, device, process_group):
        """Right results and gradients, or an error that says how to go on."""
        from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

        def spread(t):
            return DTensor.from_local(t.detach(), mesh, [Replicate()]).requires_grad_()

        mesh = init_device_mesh(device.type, (1,))
        plain, keywords = leaves(self.inputs(device)), self.op.variants[0]
        parts = [spread(t) for t in plain]
        for place in range(len(plain) if len(plain) > 1 else 0):
            inputs = [
                one if i == place else t
                for i, (one, t) in enumerate(zip(parts, plain, strict=True))
            ]
            with pytest.raises(ops.ArgumentError, match="DTensor"):
                self.op.results(inputs, keywords)
        if not self.op.shards:
            with pytest.raises(ops.ArgumentError, match="DTensor: call .full_tensor()"):
                self.op.results(parts, keywords)
            return
        if backend != "torch":
            with pytest.raises(ops.BackendUnavailableError, match="no DTensor.*BACKEND=torch"):
                self.op.results(parts, keywords)
            return
        results, expected = (self.op.differentiable(t, keywords) for t in (parts, plain))
        found = torch.autograd.grad(results, parts, [x.detach() for x in results])
        grads = torch.autograd.grad(expected, plain, [x.detach() for x in expected])
        for one, other in zip((*results, *found), (*expected, *grads), strict=True):
            close(one.full_tensor(), other, torch.float64)

    # ---- finite differences ----------------------------------------------------------------------

    def test_gradcheck(self, backend, device):
        for keywords in self.op.variants:
            inputs = leaves(self.inputs(device))
            call = lambda *t: self.op.differentiable(t, keywords)  # noqa: B023, E731
            assert torch.autograd.gradcheck(
                call, inputs, check_forward_ad=not self.op.numpy, check_batched_grad=False
            )
            assert torch.autograd.gradgradcheck(call, inputs)

    def test_batched_gradients(self, backend, device):
        """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses."""
        inputs = leaves(self.inputs(device))
        if self.op.numpy:
            (out,) = self.op.differentiable(inputs, self.op.variants[-1])
            with pytest.raises(ops.GradientError, match="cannot take batched gradients"):
                torch.autograd.grad(out, inputs, out.detach()[None], is_grads_batched=True)
            return
        for output in self.op.differentiable(inputs, self.op.variants[-1]):
            seeds = torch.eye(output.numel(), dtype=output.dtype, device=device)
            out = output.flatten()
            keep = {"retain_graph": True}
            batched = torch.autograd.grad(out, inputs, seeds, is_grads_batched=True, **keep)
            for i, seed in enumerate(seeds):
                single = torch.autograd.grad(out, inputs, seed, **keep)
                for one, many in zip(single, batched, strict=True):
                    close(many[i], one, torch.float64)

    def test_function_transforms(self, backend, device):
        keywords = self.op.variants[0]
        inputs = self.inputs(device)
        scalar = lambda *t: sum(x.sum() for x in self.op.differentiable(t, keywords))  # noqa: E731
        plain = lambda *t: sum(  # noqa: E731
            x.sum() for x in self.op.naive(t, keywords) if x.is_floating_point()
        )
        close(torch.func.grad(scalar)(*inputs), torch.func.grad(plain)(*inputs), torch.float64)
        many = [torch.stack([t, 2 * t, -t]) for t in inputs]
        one_by_one = torch.stack([plain(*each) for each in zip(*many, strict=True)])
        close(torch.func.vmap(scalar)(*many), one_by_one, torch.float64)

    def test_tensors_that_outlive_their_transform(self, backend, device):
        """What leaks out of torch.func is a wrapper of a tensor; its gradient must arrive."""
        inputs, keywords = self.inputs(device), self.op.variants[0]
        leaked = []
        torch.func.grad(lambda t: (leaked.append(2 * t), (t * t).sum())[1])(inputs[0])
        assert torch._C._functorch.is_functorch_wrapped_tensor(leaked[0])
        factor = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
        results = self.op.differentiable([leaked[0] * factor, *inputs[1:]], keywords)
        expected = self.op.differentiable([2 * inputs[0] * factor, *inputs[1:]], keywords)
        for one, other in zip(results, expected, strict=True):
            close(one, other, torch.float64)
        gradients = [
            torch.autograd.grad(sum(x.sum() for x in out), factor)[0] for out in (results, expected)
        ]
        close(*gradients, torch.float64)
        direct = self.op.differentiable([leaked[0], *inputs[1:]], keywords)
        for one, other in zip(direct, expected, strict=True):
            close(one, other.detach(), torch.float64)

    def test_forward_mode_over_a_backward_pass(self, backend, device):
        """A tangent that arrives with the gradient goes on."""
        inputs = leaves(self.inputs(device))
        for out in self.op.differentiable(inputs, self.op.variants[0]):
            grad, tangent = torch.randn(2, *out.shape, dtype=out.dtype, device=device)
            (expected,) = torch.autograd.grad(out, inputs[:1], tangent, retain_graph=True)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(grad, tangent)
                if self.op.numpy:
                    with pytest.raises(RuntimeError, match="jvp"):
                        torch.autograd.grad(out, inputs[:1], dual)
                    continue
                (result,) = torch.autograd.grad(out, inputs[:1], dual, retain_graph=True)
                close(
                    torch.autograd.forward_ad.unpack_dual(result).tangent, expected, torch.float64
                )

    # ---- edges -----------------------------------------------------------------------------------

    def test_empty_and_single(self, backend, device):
        for shape, keywords in itertools.product(self.op.edges, self.op.variants):
            self.agree(self.inputs(device, shape=shape), keywords)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_inputs(self, backend, device, value):
        """NaN and infinity go where they go in the op's own tensor code."""
        for place, keywords in itertools.product(range(len(self.op.names)), self.op.variants):
            inputs = self.inputs(device, torch.float32)
            inputs[place].view(-1)[-1] = value
            mine, theirs = leaves(inputs), leaves(inputs)
            results = self.op.differentiable(mine, keywords)
            with ops.use_backend("torch"):
                expected = self.op.differentiable(theirs, keywords)
            for one, other in zip(results, expected, strict=True):
                close(one, other, torch.float32)
            sum(x.sum() for x in results).backward()
            sum(x.sum() for x in expected).backward()
            for one, other in zip(mine, theirs, strict=True):
                close(one.grad, other.grad, torch.float32)

    def test_inputs_are_untouched(self, backend, device):
        inputs = leaves(self.inputs(device, torch.float32))
        before = [t.detach().clone() for t in inputs]
        versions = [t._version for t in inputs]
        sum(x.sum() for x in self.op.differentiable(inputs, self.op.variants[0])).backward()
        assert [t._version for t in inputs] == versions
        for now, then in zip(inputs, before, strict=True):
            assert torch.equal(now, then)

    def test_same_bits_every_time(self, backend, device):
        inputs = leaves(self.inputs(device, torch.float32, self.op.large))

        def run():
            results = self.op.differentiable(inputs, self.op.variants[0])
            return [*results, *torch.autograd.grad(sum(x.sum() for x in results), inputs)]

        first = run()
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, threads):
                torch.set_num_threads(count)
                if backend in ("torch", "cuda-emulated") and count != threads:
                    continue  # torch's own sums and products may differ with their number
                for now, then in zip(run(), first, strict=True):
                    assert torch.equal(now, then)
        finally:
            torch.set_num_threads(threads)

    def test_no_gradient_wanted(self, backend, device):
        inputs = self.inputs(device, torch.float32)
        for result in self.op.results(inputs, self.op.variants[0]):
            assert result.grad_fn is None
        with torch.no_grad():
            for result in self.op.results(leaves(inputs), self.op.variants[0]):
                assert result.grad_fn is None
        with torch.inference_mode():
            self.op.results(inputs, self.op.variants[0])

    # NumPy and compiled code compute with content.
    @applies(lambda op, backend: op.compiles and backend == "torch")
    def test_meta_tensors(self, backend, device):
        """Shapes and dtypes without content, as for a model that is built without memory."""
        for dtype in (torch.float32, torch.bfloat16):
            real = self.inputs("cpu", dtype)
            results = self.op.results([t.to("meta") for t in real], self.op.variants[0])
            for one, other in zip(results, self.op.results(real, self.op.variants[0]), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)

    def test_backward_twice(self, backend, device):
        inputs = leaves(self.inputs(device))
        out = sum(x.sum() for x in self.op.differentiable(inputs, self.op.variants[0]))
        once = torch.autograd.grad(out, inputs, retain_graph=True)
        for one, other in zip(once, torch.autograd.grad(out, inputs), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()

    # The torch path need not have saved this very tensor.
    @applies(lambda op, backend: backend != "torch")
    def test_modified_input_is_noticed(self, backend, device):
        inputs = leaves(self.inputs(device))
        first = inputs[0] * 1
        results = self.op.differentiable([first, *inputs[1:]], self.op.variants[0])
        first += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(x.sum() for x in results).backward()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_saved_tensors_in_other_layouts(self, backend, device, dtype):
        """Hooks on saved tensors may give back other strides, another offset, a lazy negation."""
        inputs, keywords = leaves(self.inputs(device, dtype)), self.op.variants[0]

        def gradients():
            once, again = (self.op.differentiable(inputs, keywords) for _ in range(2))
            first = torch.autograd.grad(once, inputs, [x.detach() for x in once])
            recorded = torch.autograd.grad(again, inputs, again, create_graph=True)
            return *first, *torch.autograd.grad(sum(x.square().sum() for x in recorded), inputs)

        expected = gradients()
        negated = lambda t: torch._neg_view(-t) if t.is_floating_point() else t  # noqa: E731
        for lay in (*LAYOUTS.values(), negated):
            saved = []

            def pack(t, lay=lay, saved=saved):
                kept = lay(t.detach().clone())
                saved.append((kept, kept.clone()))
                return kept

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                for one, other in zip(gradients(), expected, strict=True):
                    close(one, other, dtype)
            assert saved
            for kept, before in saved:  # a hook may give the same tensor back again
                assert torch.equal(kept, before)

    # ---- what surrounds an op in a training script -----------------------------------------------

    @applies(lambda op, backend: op.module is not None)
    def test_module(self, backend, device):
        module = self.op.module().to(device)
        inputs = self.inputs(device, torch.float32)[: self.op.module_takes]
        again = copy.deepcopy(module)
        for one, other in zip(several(module(*inputs)), several(again(*inputs)), strict=True):
            assert torch.equal(one, other)
        assert repr(module) == repr(again)

    def test_autocast(self, backend, device):
        """Mixed inputs are taken to the dtype in which torch's own such functions compute."""
        first, *rest = self.inputs(device, torch.float32)
        mixed = [first, *[t.bfloat16() for t in rest]]
        for inputs in (mixed, [t.bfloat16() for t in mixed]):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                results = self.op.results(inputs, self.op.variants[0])
            same = [t.to(self.op.autocast) for t in inputs]
            expected = self.op.results(same, self.op.variants[0])
            for one, other in zip(results, expected, strict=True):
                assert one.dtype == other.dtype
                close(one, other, self.op.autocast)
