"""The battery every op passes: one op, any back end.

A test file describes its op as an :class:`OpUnderTest` and subclasses :class:`Battery`; the back
ends come from ``--backends``.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from tests.op_under_test import DTYPES, OpUnderTest, close, leaves


class Battery:
    """Subclass with ``op = OpUnderTest(...)``."""

    op: OpUnderTest

    # ---- values and gradients against the naive reference ----------------------------------------

    def agree(self, inputs, keywords, needed=None, dtype=None):
        """Result and gradients agree with the reference computed in float64."""
        dtype = dtype or inputs[0].dtype
        ours = leaves(inputs, needed)
        theirs = [t.detach().double().requires_grad_(t.requires_grad) for t in ours]
        result = self.op.call(*ours, **keywords)
        expected = self.op.reference(*theirs, **keywords)
        assert result.dtype == dtype
        assert result.shape == expected.shape
        close(result, expected, dtype)
        if not result.requires_grad:
            assert not any(t.requires_grad for t in ours)
            return
        grad = torch.randn_like(expected).to(dtype)
        result.backward(grad)
        expected.backward(grad.double())
        for name, mine, reference in zip(self.op.names, ours, theirs, strict=True):
            assert (mine.grad is None) == (reference.grad is None), name
            if mine.grad is not None:
                assert mine.grad.dtype == dtype
                close(mine.grad, reference.grad, dtype)

    def variants(self):
        return self.op.variants

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, backend, device, dtype):
        for shape, keywords in itertools.product(self.op.shapes, self.op.variants):
            self.agree(self.op.inputs(shape, dtype, device), keywords)

    def test_every_requires_grad_subset(self, backend, device):
        shape = self.op.shapes[-1]
        for needed in itertools.product((True, False), repeat=len(self.op.names)):
            for keywords in self.op.variants:
                self.agree(self.op.inputs(shape, torch.float64, device), keywords, needed)

    def test_layouts(self, backend, device):
        """Transposed, strided, offset by one element, and broadcast inputs."""
        keywords = self.op.variants[0]
        for dtype in (torch.float64, torch.float32):
            plain = self.op.inputs((6, 8), dtype, device)
            layouts = {
                "transposed": [t.t().contiguous().t() for t in plain],
                "every other row": [torch.stack([t, t], 1).flatten(0, 1)[::2] for t in plain],
                "every other column": [torch.stack([t, t], -1).flatten(1)[:, ::2] for t in plain],
                "column slice": [torch.cat([t, t, t], 1)[:, 3:11] for t in plain],
                "offset": [torch.cat([t.flatten(), t[0]])[1:49].view(6, 8) for t in plain],
                "3-d, permuted": [torch.stack([t, t + 1]).permute(1, 0, 2) for t in plain],
                "one shared row": [t[:1].expand(6, 8) if i else t for i, t in enumerate(plain)],
            }
            for inputs in layouts.values():
                self.agree(inputs, keywords)

    def test_broadcasting(self, backend, device):
        wide, keywords = self.op.inputs((3, 4, 5), torch.float64, device), self.op.variants[0]
        for narrow_shape in ((5,), (4, 5), (3, 1, 5), (1, 1, 1)):
            for place in range(len(wide)):
                inputs = list(wide)
                inputs[place] = self.op.inputs(narrow_shape, torch.float64, device)[place]
                self.agree(inputs, keywords)

    def test_same_tensor_twice(self, backend, device):
        x, y, *rest = self.op.inputs((4, 6), torch.float64, device)
        keywords = self.op.variants[0]
        mine = leaves([x, y, *rest])
        other = [t.detach().clone().requires_grad_() for t in mine]
        self.op.call(mine[0], mine[0], *mine[2:], **keywords).sum().backward()
        self.op.reference(other[0], other[0], *other[2:], **keywords).sum().backward()
        close(mine[0].grad, other[0].grad, torch.float64)

    def test_conjugated_and_negated_views(self, backend, device):
        """A lazy negative view is what it stands for."""
        inputs = self.op.inputs((4, 6), torch.float64, device)
        lazy = [torch.complex(t, -t).conj().imag for t in inputs]
        assert lazy[0].is_neg()
        close(
            self.op.call(*lazy, **self.op.variants[0]),
            self.op.reference(*inputs, **self.op.variants[0]),
            torch.float64,
        )

    # ---- finite differences ----------------------------------------------------------------------

    def test_gradcheck(self, backend, device):
        for keywords in self.op.variants:
            inputs = leaves(self.op.inputs(self.op.shapes[-1], torch.float64, device))
            call = lambda *t: self.op.call(*t, **keywords)  # noqa: B023, E731
            assert torch.autograd.gradcheck(
                call, inputs, check_forward_ad=True, check_batched_grad=False
            )
            assert torch.autograd.gradgradcheck(call, inputs)

    def test_batched_gradients(self, backend, device):
        """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses."""
        inputs = leaves(self.op.inputs((3, 5), torch.float64, device))
        out = self.op.call(*inputs, **self.op.variants[-1]).flatten()
        seeds = torch.eye(len(out), dtype=torch.float64, device=device)
        batched = torch.autograd.grad(out, inputs, seeds, is_grads_batched=True, retain_graph=True)
        for i, seed in enumerate(seeds):
            single = torch.autograd.grad(out, inputs, seed, retain_graph=True)
            for one, many in zip(single, batched, strict=True):
                close(many[i], one, torch.float64)

    def test_function_transforms(self, backend, device):
        keywords = self.op.variants[0]
        inputs = self.op.inputs((4, 3, 5), torch.float64, device)
        scalar = lambda *t: self.op.call(*t, **keywords).sum()  # noqa: E731
        plain = lambda *t: self.op.reference(*t, **keywords).sum()  # noqa: E731
        close(torch.func.grad(scalar)(*inputs), torch.func.grad(plain)(*inputs), torch.float64)
        close(torch.func.vmap(scalar)(*inputs), torch.func.vmap(plain)(*inputs), torch.float64)

    # ---- edges -----------------------------------------------------------------------------------

    def test_empty_and_single(self, backend, device):
        for shape in ((0, 4), (4, 0), (0, 0), (1, 4), (1, 1), (7,), (2, 0, 3)):
            for keywords in self.op.variants:
                self.agree(self.op.inputs(shape, torch.float64, device), keywords)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_inputs(self, backend, device, value):
        """NaN and infinity go where they go in the op's own tensor code."""
        for place, keywords in itertools.product(range(len(self.op.names)), self.op.variants):
            inputs = self.op.inputs((5, 6), torch.float32, device)
            inputs[place][2, 3] = value
            self.agree_on_non_finite(inputs, keywords)

    def agree_on_non_finite(self, inputs, keywords):
        import ops

        mine, theirs = leaves(inputs), leaves(inputs)
        result = self.op.call(*mine, **keywords)
        with ops.use_backend("torch"):
            expected = self.op.call(*theirs, **keywords)
        close(result, expected, torch.float32)
        result.sum().backward()
        expected.sum().backward()
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, torch.float32)

    def test_inputs_are_untouched(self, backend, device):
        inputs = leaves(self.op.inputs((5, 7), torch.float32, device))
        before = [t.detach().clone() for t in inputs]
        versions = [t._version for t in inputs]
        self.op.call(*inputs, **self.op.variants[0]).sum().backward()
        assert [t._version for t in inputs] == versions
        for now, then in zip(inputs, before, strict=True):
            assert torch.equal(now, then)

    def test_same_bits_every_time(self, backend, device):
        inputs = leaves(self.op.inputs((777, 333), torch.float32, device))

        def run():
            out = self.op.call(*inputs, **self.op.variants[0])
            return [out, *torch.autograd.grad(out.sum(), inputs)]

        first = run()
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, threads):
                torch.set_num_threads(count)
                if backend == "torch" and count != threads:
                    continue  # torch's own sums may differ with the number of threads
                for now, then in zip(run(), first, strict=True):
                    assert torch.equal(now, then)
        finally:
            torch.set_num_threads(threads)

    def test_no_gradient_wanted(self, backend, device):
        inputs = self.op.inputs((3, 4), torch.float32, device)
        assert self.op.call(*inputs, **self.op.variants[0]).grad_fn is None
        with torch.no_grad():
            assert self.op.call(*leaves(inputs), **self.op.variants[0]).grad_fn is None
        with torch.inference_mode():
            self.op.call(*inputs, **self.op.variants[0])

    def test_backward_twice(self, backend, device):
        inputs = leaves(self.op.inputs((3, 4), torch.float64, device))
        out = self.op.call(*inputs, **self.op.variants[0]).sum()
        once = torch.autograd.grad(out, inputs, retain_graph=True)
        for one, other in zip(once, torch.autograd.grad(out, inputs), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()

    def test_modified_input_is_noticed(self, backend, device):
        inputs = leaves(self.op.inputs((3, 4), torch.float64, device))
        first = inputs[0] * 1
        out = self.op.call(first, *inputs[1:], **self.op.variants[0]).sum()
        first += 1
        if backend != "torch":  # the torch path need not have saved this very tensor
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()

    # ---- what surrounds an op in a training script -----------------------------------------------

    def test_module(self, backend, device):
        module = self.op.module()
        inputs = leaves(self.op.inputs((3, 4), torch.float32, device))
        again = copy.deepcopy(module)
        assert torch.equal(module(*inputs), again(*inputs))
        assert repr(module) == repr(again)
        assert list(module.state_dict()) == []

    def test_autocast(self, backend, device):
        """In float32 within autocast, mixed inputs included, as torch's distances are."""
        a, *rest = self.op.inputs((3, 4), torch.float32, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = self.op.call(a, *[t.bfloat16() for t in rest], **self.op.variants[0])
        assert mixed.dtype == torch.float32
        close(
            mixed,
            self.op.call(a, *[t.bfloat16().float() for t in rest], **self.op.variants[0]),
            torch.float32,
        )

    def test_compiles_without_a_graph_break(self, backend, device):
        torch._dynamo.reset()
        keywords = self.op.variants[0]
        compiled = torch.compile(
            lambda *t: self.op.call(*t, **keywords) * 2, fullgraph=True, backend="aot_eager"
        )
        inputs = leaves(self.op.inputs((5, 6), torch.float32, device))
        same = leaves(inputs)
        compiled(*inputs).sum().backward()
        (self.op.call(*same, **keywords) * 2).sum().backward()
        for one, other in zip(inputs, same, strict=True):
            close(one.grad, other.grad, torch.float32)

    # ---- the compiled operators themselves -------------------------------------------------------

    def test_operators(self, compiled, device):
        """Schema, shapes and tracing of each operator, by torch's own checker."""
        self.op.call(*self.op.inputs((2, 3), torch.float32, device), **self.op.variants[0])
        for operator, arguments in self.op.operator_samples(device):
            torch.library.opcheck(operator, arguments)
