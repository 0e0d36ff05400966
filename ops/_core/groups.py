"""Process groups in attributes of modules and of autograd graphs."""

from __future__ import annotations

import weakref
from typing import Any

from ops._errors import ArgumentError


class WeakGroup:
    """An attribute ``group`` that does not keep its process group alive.

    A process can end with "terminate called" if a group is alive when Python exits, or if a thread
    of the group frees a graph that holds it. So modules and graphs do not hold the group after
    ``torch.distributed.destroy_process_group``. A copy of a module has the same group. Values that
    are no group are kept as they are: the loss refuses them when it is called.

    Raises:
        ArgumentError: the attribute is read, and the group was destroyed since.
    """

    def __set__(self, owner: Any, group: Any) -> None:
        owner.__dict__["group"] = weakref.ref(group) if is_group(group) else group

    def __get__(self, owner: Any, _: type) -> Any:
        if owner is None or "group" not in owner.__dict__:
            raise AttributeError("group")
        kept = owner.__dict__["group"]
        if not isinstance(kept, weakref.ref):
            return kept
        group = kept()
        if group is None:
            raise ArgumentError(
                "group must be alive, but it was destroyed: call torch.distributed."
                "destroy_process_group() after the last forward and backward pass"
            )
        return group


def is_group(group: Any) -> bool:
    """Whether this is a process group. ``NON_GROUP_MEMBER`` is none."""
    if group is None:
        return False
    from torch.distributed import ProcessGroup  # imports torch.distributed, which few need

    return isinstance(group, ProcessGroup)
