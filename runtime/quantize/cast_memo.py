"""Cast memo: a cast of a tensor is found again by whoever casts the same values alike, while they live.

    q, k and v cast one x          the first makes the cast, the others find it

What lies in memory is told by its storage, address, layout, dtype and version, which every write in place moves on,
also one through a view: an alias of a tensor (a view of its shape, what a hook wraps around it) is the tensor. An entry
goes with the storage. A tensor without a version (made in inference mode), and one under a dispatch mode, where
operations must come as they are, is cast each time.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Cast = TypeVar("Cast")
_Place = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype, torch.device]


class CastMemo:
    """Casts by tensor and key. One for the process: what a tensor and a key say does not depend on the model."""

    def __init__(self) -> None:
        self._entries: dict[_Place, tuple[_StorageRef, int, dict[Hashable, Any]]] = {}
        self._brief: tuple[dict[Hashable, Any], set[Hashable]] = {}, set()
        self.num_found = 0
        """How many casts were found and not made, for tests and reports."""

    def find_or_make(self, x: Tensor, key: Hashable, make: Callable[[], Cast], is_brief: bool = False) -> Cast:
        """The cast of x under `key`; `make()` where there is none of this version of x. One that `is_brief` lives till
        another tensor has such a cast: backward has codes of its own, and the values would lie beside them.
        """
        if torch.is_inference_mode_enabled() or x.is_inference() or _get_current_dispatch_mode() is not None:
            return make()
        storage = x.untyped_storage()
        place = (int(storage._cdata), int(x.storage_offset()), x.shape, x.stride(), x.dtype, x.device)
        entry = self._entries.get(place)
        if entry is None or entry[1] != x._version or entry[0]() is not storage:
            entry = self._entries[place] = (_StorageRef(storage, place, self._entries), x._version, {})
        if is_brief:
            self._note_brief(entry[2], key)
        found = entry[2].get(key)
        if found is None:
            found = entry[2][key] = make()
        else:
            self.num_found += 1
        return found

    def _note_brief(self, casts: dict[Hashable, Any], key: Hashable) -> None:
        of, keys = self._brief
        if of is not casts:
            for each in keys:
                of.pop(each, None)
            self._brief = casts, {key}
        else:
            keys.add(key)

    def __len__(self) -> int:
        return len(self._entries)


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that takes its entry along when the storage goes: when no tensor, and no graph, has it."""

    __slots__ = ("entries", "place")

    def __new__(cls, storage: torch.UntypedStorage, place: _Place, entries: dict[_Place, Any]) -> "_StorageRef":
        return super().__new__(cls, storage, _drop)

    def __init__(self, storage: torch.UntypedStorage, place: _Place, entries: dict[_Place, Any]) -> None:
        super().__init__(storage, _drop)  # type: ignore[call-arg]
        self.entries = entries
        self.place = place


def _drop(ref: Any) -> None:
    entry = ref.entries.get(ref.place)
    if entry is not None and entry[0] is ref:  # another tensor may lie at this address by now
        del ref.entries[ref.place]


MEMO = CastMemo()
