"""What is known of sequences: in memory the answers used last, and in a file all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from ppl_diffusion.potentials.answer_store import Answer, AnswerStore, Cost
from ppl_diffusion.potentials.causes import Failure


class Memory:
    """Answers by key; those used last are found without the file.

    :param size: answers kept in memory.
    :param store: where answers outlive the run, or None.
    :param forget_failures: whether failures are kept in the file alone: whoever mends a function
        in a session asks again.
    :param retry_failed: whether failures of the file count as not known.
    """

    def __init__(
        self,
        size: int,
        store: AnswerStore | None = None,
        *,
        forget_failures: bool = False,
        retry_failed: bool = False,
    ) -> None:
        self.size, self.store = size, store
        self.forget_failures, self.retry_failed = forget_failures, retry_failed
        self._kept: OrderedDict[bytes, Answer] = OrderedDict()

    @property
    def kept(self) -> dict[bytes, float | tuple[str, str]]:
        """The answers in memory, in plain types: numbers, or cause and message of a failure."""
        return {
            key: (answer.cause, answer.message) if isinstance(answer, Failure) else answer
            for key, answer in self._kept.items()
        }

    @kept.setter
    def kept(self, answers: Mapping[bytes, float | tuple[str, str]]) -> None:
        self._kept = OrderedDict(
            (key, Failure(*answer) if isinstance(answer, tuple) else answer)
            for key, answer in answers.items()
        )

    def find(self, keys: Iterable[bytes]) -> tuple[dict[bytes, Answer], dict[bytes, Answer]]:
        """Return the answers that are known in memory, and those that were read from the file.

        :param keys: of distinct sequences.
        """
        found = {key: self._kept[key] for key in keys if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        return found, self._stored([key for key in keys if key not in found])

    def keep(self, answers: Mapping[bytes, Answer], cost: Cost) -> None:
        """Remember answers.

        :param answers: by key.
        :param cost: of each.
        """
        if self.store is not None:
            self.store.keep(answers, cost)
        self.hold(answers)

    def hold(self, answers: Mapping[bytes, Answer]) -> None:
        """Remember answers until others crowd them out."""
        for key, answer in answers.items():
            if self.forget_failures and isinstance(answer, Failure):
                continue
            self._kept[key] = answer
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget what is not in the file."""
        self._kept.clear()

    def _stored(self, keys: list[bytes]) -> dict[bytes, Answer]:
        if self.store is None or not keys:
            return {}
        found = self.store.find(keys)
        if self.retry_failed:
            found = {k: answer for k, answer in found.items() if not isinstance(answer, Failure)}
        self.hold(found)
        return found
