"""Process groups in attributes of modules and of autograd graphs."""

from __future__ import annotations

import weakref
from typing import Any

from ops._errors import ArgumentError


class WeakGroup:
    """An attribute ``group`` that does not keep its process group alive.

    The threads of a group that is alive when Python exits can end the process. So nothing of ours
    holds a group after ``torch.distributed.destroy_process_group``. A copy has the same group.
    Other values are kept as they are: the loss refuses them when it is called.

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
