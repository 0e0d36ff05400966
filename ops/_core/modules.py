"""The module of a loss: the parameters of its function, set once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from ops._core import checks


class LossModule(nn.Module):
    """A loss as a module.

    A subclass names its function, and passes each parameter on to ``super().__init__`` by name.
    Numbers and the reduction are checked at once, the rest when the function is called.
    """

    function: ClassVar[Callable[..., Any]]
    reductions: ClassVar[Collection[str]] = checks.REDUCTIONS

    def __init__(self, **parameters: Any) -> None:
        super().__init__()
        self._parameter_names = tuple(parameters)
        for name, value in parameters.items():
            if name == "reduction":
                checks.one_of(name, value, self.reductions)
            is_number = not isinstance(value, str | bool | tuple | list | None)
            setattr(self, name, checks.check_number(name, value) if is_number else value)

    def loss(self, *tensors: Tensor, **more: Any) -> Any:
        """The function of these tensors and the parameters, which ``more`` overrides."""
        parameters = {name: getattr(self, name) for name in self._parameter_names}
        return type(self).function(*tensors, **(parameters | more))

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._parameter_names)
