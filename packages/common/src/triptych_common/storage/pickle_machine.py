"""Pickle's stack machine over plain data: it imports nothing, and neither functions nor classes are ever on its stack.

A pickle is a program that may import and call anything. This machine has a short list of names, each with a function that makes
the object; any other name, and every other way to reach one, is refused with an error that names it.

What a pickle makes is bounded by its size. Each opcode makes little and their number is bounded; a call may copy its arguments,
which an opcode of two bytes can repeat, so that calls are charged for them.
"""

import io
import mmap
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE",
    "UNICODE", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MOST_OPCODES = 1_000_000  # ten times those of NVIDIA's largest network
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))  # hashing a nested tuple may overflow the stack


class Refused(ValueError):
    """A pickle uses something that is not allowed; the message names it."""


def largest(size: int) -> int:
    """Bytes that a foreign file of this size may take in memory: float32 out of uint8 takes four times the bytes."""
    return 4 * size + (1 << 26)


class TooLarge(Refused):
    """A file of a few bytes makes many."""


class Budget:
    """Bytes that are left to what a file makes. Raises TooLarge when they are spent."""

    def __init__(self, size: int) -> None:
        self.size, self.left = size, largest(size)

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TooLarge(f"would take more than {largest(self.size):,} bytes of memory, out of {self.size:,}")


@dataclass(frozen=True)
class Name:
    """A name that a pickle would import."""

    text: str


class Machine:
    """Runs one pickle.

    calls: functions by name, which make objects; None for a name that may be mentioned but not called. build: sets the state of
    an object that a call made, or raises Refused. budget: of the file. persistent: makes the object of a persistent id.
    """

    def __init__(
        self, calls: Mapping[str, Callable[..., Any] | None], build: Callable[[Any, Any], None], budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.calls, self.build, self.budget, self.persistent = calls, build, budget, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: mmap.mmap | io.BytesIO) -> Any:
        """The object that a pickle describes. Raises Refused, or any error that damaged bytes lead to."""
        # genops only decodes opcodes; what they do is below, on lists instead of Python's own unpickler.
        for number, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], content))):
            if number == _MOST_OPCODES:
                raise TooLarge(f"has more than {_MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _LITERALS:
                self.stack.append(_CONSTANTS.get(opcode.name, argument))
            elif not (self._bookkeeping(opcode.name, argument) or self._container(opcode.name)):
                self._object(opcode.name, argument)
        raise ValueError("no end")

    def _bookkeeping(self, opcode: str, argument: Any) -> bool:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "POP":  # of a mark, where nothing is above it
                self.stack.pop() if self.stack else self._marked()
            case "POP_MARK":
                self._marked()
            case "DUP":
                self.stack.append(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case _:
                return False
        return True

    def _container(self, opcode: str) -> bool:
        match opcode:
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" | "EMPTY_SET":
                kind: Any = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}[opcode]
                self.stack.append(kind())
            case "LIST" | "TUPLE" | "DICT" | "FROZENSET":
                items = self._marked()  # before `append` is looked up, since it replaces the stack
                items = plain_keys(items) if opcode == "FROZENSET" else items
                fill: Any = {"LIST": list, "TUPLE": tuple, "DICT": dictionary, "FROZENSET": frozenset}[opcode]
                self.stack.append(fill(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode[-1])
                if len(self.stack) < n:
                    raise ValueError("empty stack")
                self.stack[-n:] = [tuple(self.stack[-n:])]
            case "APPEND" | "APPENDS":
                items = self._marked() if opcode == "APPENDS" else [self.stack.pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._marked() if opcode == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
                self._top(dict).update(dictionary(items))
            case "ADDITEMS":
                items = self._marked()
                self._top(set).update(plain_keys(items))
            case _:
                return False
        return True

    def _object(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "GLOBAL":
                self.stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, name = self.stack.pop(-2), self.stack.pop()
                self.stack.append(self._name(module, name))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.stack.pop(-2), self.stack.pop()
                self.stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                function, arguments, keywords = self.stack.pop(-3), self.stack.pop(-2), self.stack.pop()
                if type(keywords) is not dict or keywords:
                    raise Refused("calls a class with keywords")
                self.stack.append(self._call(function, arguments))
            case "BUILD":
                state = self.stack.pop()
                self.budget.spend(_weight(state))
                self.build(self.stack[-1], state)
            case "BINPERSID" if self.persistent is not None:
                self.stack.append(self.persistent(self.stack.pop()))
            case _:  # persistent ids, extension codes, INST, OBJ, out-of-band buffers, Python 2's long strings
                if opcode == "INST":
                    self._name(*argument.split(" ", 1))  # to refuse a harmful name by name
                argument = f" {argument}" if type(argument) is int else ""
                raise Refused(f"uses the pickle opcode {opcode}{argument}, which no network needs; nothing was run")

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Refused(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _name(self, module: Any, name: Any) -> Name:
        text = f"{module}.{name}" if type(module) is type(name) is str else "?"
        text = text.replace("numpy._core.", "numpy.core.")  # since numpy 2
        if text not in self.calls:
            name = ascii(text[:100])[1:-1]
            raise Refused(f"names {name}, which no network needs and which could run code; nothing was run")
        return Name(text)

    def _call(self, function: Any, arguments: Any) -> Any:
        call = self.calls.get(function.text) if type(function) is Name else None
        if call is None or type(arguments) is not tuple:
            raise Refused("calls what is no function")
        self.budget.spend(_weight(arguments))
        try:
            return call(*arguments)
        except Refused:
            raise
        except Exception as error:  # of any kind, as arguments may be anything
            raise Refused(f"calls {function.text} with arguments that make nothing") from error


def _weight(value: Any, deep: bool = True) -> int:
    """Bytes that a copy of an argument, or of the parts of one, takes."""
    if type(value) in (bytes, str):
        return len(value)
    if type(value) in (list, tuple, set, frozenset, dict):
        return 100 * len(value) + (sum(_weight(part, False) for part in value) if deep else 0)
    return 100


def dictionary(items: Sequence[Any]) -> dict[Any, Any]:
    """A dictionary of alternating keys and values."""
    return dict(zip(plain_keys(items[::2]), items[1::2], strict=True))


def plain_keys(items: Iterable[Any]) -> list[Any]:
    """The same items. Raises Refused where one may not be a key."""
    items = list(items)
    for item in items:
        if type(item) not in _PLAIN_KEYS:
            raise Refused(f"has a {type(item).__name__} as a key")
    return items
