"""Process groups in attributes of modules and of autograd graphs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ops._errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class WeakGroup:
    """An attribute that is a process group or None, and does not keep the group alive.

    The threads of a group that is alive when Python exits can end the process. So nothing of ours
    holds a group after ``torch.distributed.destroy_process_group``. A copy has the same group.

    Raises:
        ArgumentTypeError: when it is set, to something else.
        ArgumentError: when it is read, and the group was destroyed since.
    """

    def __set__(self, owner: Any, group: ProcessGroup | None) -> None:
        owner.__dict__["_group"] = None if group is None else weakref.ref(_checked(group))

    def __get__(self, owner: Any, _: type) -> ProcessGroup | None:
        reference = owner.__dict__["_group"]
        if reference is None:
            return None
        group: ProcessGroup | None = reference()
        if group is None:
            raise ArgumentError(
                "group must be alive, but it was destroyed: call torch.distributed."
                "destroy_process_group() after the last forward and backward pass"
            )
        return group


def _checked(group: Any) -> ProcessGroup:
    from torch.distributed import ProcessGroup  # imports torch.distributed, which few need

    if not isinstance(group, ProcessGroup):
        raise ArgumentTypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    return group
