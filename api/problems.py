"""What is wrong with the user's input, in one line that says where and what to do."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One fault. As text: `shop.yaml: document 2: Pod shop/web: status.podIPs[0]: expected ...`."""

    file: str
    message: str
    document: int = 0
    """Counts from 1 in the file; 0: the file as a whole."""
    item: int = 0
    """Counts from 1 in a List; 0: the document is no List."""
    subject: str = ""
    """Kind, namespace and name as far as they could be read."""
    field: str = ""

    def __str__(self) -> str:
        place = f"document {self.document}" if self.document else ""
        if self.item:
            place += f" item {self.item}"
        text = ": ".join(part for part in (self.file, place, self.subject, self.field, self.message) if part)
        return " ".join(text.split())


class InputError(ValueError):
    """Raised when nothing can be read at all; the cause is `problem`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
