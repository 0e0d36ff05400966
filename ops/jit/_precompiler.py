"""The process that precompiles torch's default header, and tries it before anybody else does.

The header is first made with the templates in it that its functions use (``_instantiate``), by
which builds take less than half the time. That is not what g++ was made for, so it is tried: a
module that uses much of torch and pybind11 must build with it, load with all of its symbols, and
compute what it should. Where that fails, for whatever reason, a plain precompiled header is made
instead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ops import _config
from ops._errors import BuildTimeoutError, JitopsError
from ops.jit import _key, _precompiled
from ops.jit._cache import _inventory, _lock, _staging, _store
from ops.jit._compile import _build, _instantiate, _toolchain
from ops.jit._spec import Spec

_TRIAL = r"""
#include <torch/extension.h>
#include <ATen/Parallel.h>
#include <sstream>
#include <unordered_map>

namespace {
struct Thing {
  virtual ~Thing() = default;
  virtual torch::Tensor get(const torch::Tensor& x) { return x + 1; }
};
struct Other : Thing {
  torch::Tensor get(const torch::Tensor& x) override { return x * 2; }
};
class Twice : public torch::autograd::Function<Twice> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, torch::Tensor x) {
    context->save_for_backward({x});
    return x * 2;
  }
  static torch::autograd::tensor_list backward(
      torch::autograd::AutogradContext*, torch::autograd::tensor_list gradients) {
    return {gradients[0] * 2};
  }
};
std::unordered_map<std::string, std::vector<torch::Tensor>> sorted(
    const std::vector<torch::Tensor>& all, std::optional<int64_t> least) {
  std::unordered_map<std::string, std::vector<torch::Tensor>> found;
  for (const auto& one : all)
    if (!least || one.numel() >= *least) found[c10::str(one.dim())].push_back(one);
  return found;
}
double total(const torch::Tensor& x) {
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "total", [&] {
    const auto* data = x.const_data_ptr<scalar_t>();
    std::vector<double> each(x.numel());
    at::parallel_for(0, x.numel(), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) each[i] = data[i];
    });
    for (double one : each) sum += one;
  });
  return sum;
}
bool refuses(const torch::Tensor& x) {
  try {
    TORCH_CHECK(x.dim() == 99, "got ", x.sizes(), " of ", x.dtype());
  } catch (const c10::Error& error) {
    return std::string(error.what()).find("got [2, 3] of float") != std::string::npos;
  }
  return false;
}
bool trial() {
  auto x = torch::ones({2, 3}, torch::requires_grad());
  Twice::apply(x).sum().backward();
  bool right = x.grad().sum().item<double>() == 12;
  std::unique_ptr<Thing> thing = std::make_unique<Other>();
  right &= dynamic_cast<Other*>(thing.get()) && thing->get(x).sum().item<double>() == 12;
  right &= sorted({x, torch::ones({1})}, 2).at("2").size() == 1 && total(x.detach()) == 6;
  c10::List<torch::Tensor> list({x, x});
  right &= c10::IValue(list).toTensorVector().size() == 2;
  std::ostringstream text;
  text << x.sizes() << torch::kFloat;
  right &= text.str() == "[2, 3]Float" && refuses(x);
  return right && torch::nn::Linear(3, 2)->forward(x).size(1) == 2;
}
}  // namespace
TORCH_LIBRARY_FRAGMENT(jitops_trial, m) { m.def("twice(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(jitops_trial, CPU, m) {
  m.impl("twice", [](const at::Tensor& x) { return x * 2; });
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Thing>(m, "Thing").def(py::init<>()).def("get", &Thing::get, py::arg("x"));
  py::class_<Other, Thing>(m, "Other").def(py::init<>());
  m.def("sorted", &sorted, py::arg("all"), py::arg("least") = py::none());
  m.def("trial", &trial, py::call_guard<py::gil_scoped_release>());
}
"""
_TRY = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("jitops_trial", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x = torch.ones(2, 3)
try:
    module.Thing().get(5)
    right = False
except TypeError:
    right = module.trial() and list(module.sorted([x, x], least=3)) == ["2"]
right &= module.Thing().get(x).sum() == 12 and module.Other().get(x).sum() == 12
right &= torch.ops.jitops_trial.twice(x).sum() == 12
sys.exit(0 if right else 1)
"""


def make(asked: dict[str, Any], command: list[str], root: Path) -> None:
    """Make the entry for a request (:func:`_precompiled.request`), unless somebody else has.

    Args:
        command: precompiles the file that is its last word, not given yet.
        root: of the cache.
    """
    digest = _key.digest(asked)
    stem = _store.stem(_precompiled.NAME, digest)
    try:
        with _lock.exclusive(_store.lock_path(root, stem), _precompiled.NAME, 0.1, lambda _: None):
            if _precompiled.find(asked):
                return
            with _staging.staging(root, stem) as folder:
                started = time.time()
                instantiated = _instantiated(asked, command, folder)
                if not instantiated:
                    _precompile(command, folder, "")
                about = {
                    "name": _precompiled.NAME,
                    "digest": digest,
                    "request": asked,
                    "instantiated": instantiated,
                    "replaceable": True,
                    "seconds": round(time.time() - started, 3),
                    "built": time.time(),
                }
                file = folder / _precompiled.FILE
                entry = _store.publish(root, folder, file, {}, about)
    except BuildTimeoutError:
        return  # another one is at it
    _inventory.evict(root, _config.settings().cache_max_size, spare=entry.folder)


def _instantiated(asked: dict[str, Any], command: list[str], folder: Path) -> bool:
    """Whether there now is one with the templates instantiated, which has stood its trial."""
    compiler = _toolchain.cxx()
    try:
        flags = _instantiate.flags(compiler.command if compiler else (), folder)
        said = _precompile([*command, *flags], folder, _instantiate.END)
        return _instantiate.happened(said) and _stands_trial(asked, folder)
    except (JitopsError, OSError, subprocess.SubprocessError):
        return False


def _precompile(command: list[str], folder: Path, end: str) -> str:
    """Precompile the header, followed by the text ``end``; what g++ wrote to stderr."""
    header = folder / "extension.h"
    header.write_text(f"#include <torch/extension.h>\n{end}")
    return subprocess.run(
        [*command, str(header), "-o", str(folder / _precompiled.FILE)],
        check=True,
        cwd=folder,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ).stderr


def _stands_trial(asked: dict[str, Any], folder: Path) -> bool:
    inner = folder / "trial"
    inner.mkdir()
    spec = Spec(
        name="jitops_trial",
        cpp_sources=(_TRIAL,),
        extra_cflags=(*asked["cflags"], "-Winvalid-pch", "-Werror=invalid-pch"),
        with_cuda=asked["cuda"],
    )
    first = _precompiled.lay(inner, folder / _precompiled.FILE)
    built = _build.build(spec, inner, (), folder / "log", include_first=[first])
    words = [sys.executable, "-c", _TRY, str(built.library)]
    # In a folder of ours: Python looks for modules in the current one first.
    tried = subprocess.run(words, check=False, cwd=inner, timeout=300)
    shutil.rmtree(inner)
    return tried.returncode == 0


def main() -> None:
    """Make what stdin tells."""
    told = json.load(sys.stdin)
    try:
        make(told["asked"], told["command"], Path(told["root"]))
    except (JitopsError, OSError, subprocess.SubprocessError) as error:
        raise SystemExit(str(error)) from error  # nobody reads it: the next build tries again
