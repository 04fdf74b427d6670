"""An object that our own code cannot translate: a fault of ours, that must hurt nothing but this object.

It is left out, which every replica does alike; a policy fails closed instead.
"""

from undermesh.api.identity import ObjectRef


class Fault(Exception):
    """Raised where the state of an index is no longer to be trusted after the failure.

    Attributes:
        ref: The object at whose turn it happened.
    """

    def __init__(self, ref: ObjectRef) -> None:
        super().__init__(f"{ref} cannot be taken in")
        self.ref = ref


def note(error: BaseException) -> str:
    """For the author of the object."""
    return f"it cannot be translated ({cause(error)}) and is left out: report this, it is a fault of undermesh's"


def cause(error: BaseException) -> str:
    """One line, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:256]
