"""The calls that torch's own tests of its loader make, in one extension."""

from __future__ import annotations

import pytest
import torch

TORCHS_TESTS = """
#include <torch/torch.h>
#include <pybind11/functional.h>
enum class Colour { red = 1, blue = 2 };
struct Doubled : torch::autograd::Function<Doubled> {
  static torch::Tensor forward(torch::autograd::AutogradContext*, torch::Tensor x) { return 2 * x; }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {2 * grads[0]};
  }
};
struct Net : torch::nn::Module {
  Net(int64_t in, int64_t out) : fc(register_module("fc", torch::nn::Linear(in, out))) {
    buffer = register_buffer("buffer", torch::eye(5));
  }
  torch::Tensor forward(torch::Tensor x) { return fc->forward(x); }
  torch::nn::Linear fc;
  torch::Tensor buffer;
};
torch::Tensor doubled(torch::Tensor x) { return Doubled::apply(x); }
torch::Tensor tanh_add(torch::Tensor x, torch::Tensor y) { return x.tanh() + y.tanh(); }
torch::Tensor times_i(torch::Tensor x) {
  return x.to(torch::kComplexFloat) * c10::complex<float>(0, 1);
}
c10::ScalarType scalar_type() { return torch::kDouble; }
c10::Device device() { return c10::Device("cpu"); }
std::vector<bool> both() { return {true, false}; }
std::function<int(int)> functor(int n) { return [n](int x) { return x + n; }; }
Colour colour() { return Colour::blue; }
void warns() { TORCH_WARN("look here"); }
void fails() { TORCH_CHECK(false, "no such thing"); }
void extra_bindings(py::module_ m) {
  py::enum_<Colour>(m, "Colour").value("red", Colour::red).value("blue", Colour::blue);
  auto net = torch::python::bind_module<Net>(m, "Net");
  net.def(py::init<int64_t, int64_t>()).def("forward", &Net::forward);
}
"""
NAMES = [
    *("doubled", "tanh_add", "times_i", "scalar_type", "device", "both", "functor", "colour"),
    *("warns", "fails", "extra_bindings"),
]


def check(module):
    """Everything in TORCHS_TESTS does as it says."""
    x = torch.randn(3, requires_grad=True)
    torch.testing.assert_close(module.tanh_add(x, x), 2 * x.tanh())
    module.doubled(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    assert module.times_i(torch.ones(1)).tolist() == [1j]
    assert (module.scalar_type(), module.device()) == (torch.double, torch.device("cpu"))
    assert module.both() == [True, False]
    assert module.functor(2)(3) == 5
    module.extra_bindings(module)
    assert module.colour() == module.Colour.blue
    net = module.Net(5, 2)
    assert {name for name, _ in net.named_parameters()} == {"fc.weight", "fc.bias"}
    assert {name for name, _ in net.named_buffers()} == {"buffer"}
    net.forward(torch.ones(1, 5)).sum().backward()
    assert dict(net.named_parameters())["fc.weight"].grad.shape == (2, 5)
    net.to(torch.double)
    assert {one.dtype for one in net.parameters()} == {torch.double}
    assert len(list(torch.nn.Sequential(net).parameters())) == 2
    with pytest.warns(UserWarning, match="look here"):
        module.warns()
    with pytest.raises(RuntimeError, match="no such thing"):
        module.fails()
