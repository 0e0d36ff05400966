"""What every op passes under torch.compile, and its compiled operators by themselves."""

from __future__ import annotations

import pytest
import torch

from tests.harness.op_under_test import OpUnderTest, applies, close, leaves

# torch's own, after any graph break that leaves an intermediate tensor.
LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"


class CompileBattery:
    """The part of :class:`tests.harness.battery.Battery` that compiles."""

    op: OpUnderTest
    backends = ("torch", "cpp", "cuda-emulated", "cuda")

    def inputs(self, device, dtype=torch.float64, shape=None):
        return self.op.inputs(shape or self.op.shapes[-1], dtype, device)

    @pytest.mark.thorough
    def test_transforms_within_compile(self, backend, device):
        torch._dynamo.reset()
        keywords = self.op.variants[0]
        inputs = self.inputs(device)
        scalar = lambda *t: sum(x.sum() for x in self.op.differentiable(t, keywords))  # noqa: E731
        forward_mode = lambda *t: torch.func.jvp(scalar, t, t)[1]  # noqa: E731
        for transform in (torch.func.grad(scalar), forward_mode):
            if self.op.numpy and transform is forward_mode:
                with pytest.raises(RuntimeError, match="jvp"):
                    transform(*inputs)
                continue
            compiled = torch.compile(transform, backend="aot_eager", fullgraph=self.op.compiles)
            close(compiled(*inputs), transform(*inputs), torch.float64)
            assert compiled(*inputs).abs().sum() > 0

    @pytest.mark.filterwarnings(LEAF)
    def test_compiles(self, backend, device):
        """In one graph, except for ops on NumPy."""
        torch._dynamo.reset()
        keywords = self.op.variants[0]
        call = lambda *t: [x * 2 for x in self.op.differentiable(t, keywords)]  # noqa: E731
        compiled = torch.compile(call, fullgraph=self.op.compiles, backend="aot_eager")
        inputs = leaves(self.inputs(device, torch.float32))
        same = leaves(inputs)
        sum(x.sum() for x in compiled(*inputs)).backward()
        sum(x.sum() for x in call(*same)).backward()
        for one, other in zip(inputs, same, strict=True):
            close(one.grad, other.grad, torch.float32)

    @pytest.mark.thorough
    @pytest.mark.filterwarnings(LEAF)
    def test_second_order_of_a_compiled_graph(self, backend, device):
        """As without a compiler, or refused (aot_autograd refuses); never dropped."""
        keywords = self.op.variants[0]
        inputs = leaves(self.inputs(device))
        call = lambda *t: sum(x.square().sum() for x in self.op.differentiable(t, keywords))  # noqa: E731

        def second(f):
            first = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

        expected = second(call)
        for compiler in ("eager", "aot_eager") if self.op.compiles else ("eager",):
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=self.op.compiles, backend=compiler)
            if compiler == "aot_eager":
                refused = "double backward|not have been used|does not require grad"  # torch 2.11
                with pytest.raises(RuntimeError, match=refused):
                    second(compiled)
                continue
            for one, other in zip(second(compiled), expected, strict=True):
                close(one, other, torch.float64)

    @pytest.mark.thorough
    @applies(lambda op, backend: op.operator_samples is not None and backend != "torch")
    def test_operators(self, backend, device):
        """Schema, shapes and tracing of each operator, by torch's own checker."""
        self.op.results(self.inputs(device, torch.float32), self.op.variants[0])
        samples = list(self.op.operator_samples(device))
        assert samples
        for operator, arguments in samples:
            torch.library.opcheck(operator, arguments)
