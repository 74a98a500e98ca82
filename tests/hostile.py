"""Files that would run code, start programs, reach the network, hang or fill memory if a reader trusted them.

`python hostile.py JOB.json` runs command lines in one process under an audit hook and prints, for each, its exit status, what
it printed, its seconds and peak memory, and every forbidden event.
"""

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

CANARY = "TRIPTYCH_CANARY"  # names the file that hostile code would write

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
EVIL_MODULE = f"import os, pathlib\npathlib.Path(os.environ['{CANARY}']).write_text('imported')\nX = None\n"


class Run:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f'touch "${CANARY}"',)


def deep_json(levels: int = 100_000) -> bytes:
    return b'{"config":' + b"[" * levels + b"]" * levels + b"}"


def safetensors(metadata: dict[str, str], tensors: dict[str, tuple[str, list[int], bytes]] | None = None) -> bytes:
    """A safetensors file written by hand, so that anything can stand in it."""
    header: dict[str, object] = {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, content) in (tensors or {}).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def zipped_pickle(content: object) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def pickled_npz() -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.savez(file, arr_0=np.array([Run()], dtype=object))
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size; its pixels are missing."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


WEIGHTS = {  # name -> content, of files in place of a model
    "pickle.pt": lambda: pickle.dumps(Run()),
    "zipped.pt": lambda: zipped_pickle({"model": Run(), "ema": Run(), "args": Run(), "g_ema": Run()}),
    "pickle.pkl": lambda: pickle.dumps({"G_ema": Run(), "D": Run()}),
    "pickle.safetensors": lambda: pickle.dumps(Run()),
    "deep.safetensors": lambda: safetensors({"state": deep_json().decode(), "sha256": "0" * 64}),
    "header.safetensors": lambda: struct.pack("<Q", 1 << 62) + b"{}",
    "huge.safetensors": lambda: safetensors({}, {"a": ("F32", [1 << 40], b"")}),
    "escape\x1b[2J\x1b]0;owned\x07.safetensors": lambda: b"nothing",
    "empty.pt": lambda: b"",
}


def archived(policy: bytes, data: bytes = b"{}", compression: int = zipfile.ZIP_STORED) -> bytes:
    """As stable-baselines3 saves a model."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("policy.pth", policy)
        archive.writestr("data", data)
        archive.writestr("pytorch_variables.pth", data)
    return file.getvalue()


POLICIES = {  # a run's folder -> content of its archive
    "pickle": lambda: archived(pickle.dumps(Run()), pickle.dumps(Run())),
    "zipped pickle": lambda: archived(zipped_pickle({"log_std": Run()})),
    "bomb": lambda: archived(bytes(1 << 30), compression=zipfile.ZIP_DEFLATED),
    "no policy": lambda: zipped_pickle({"policy.pth": Run()}),
    "escape\x1b[2J": lambda: b"nothing",
    "empty": lambda: b"",
}
PICTURES = {
    "program.png": lambda: EPS,
    "wide.png": lambda: png_header(89_000_000, 1),
    "large.png": lambda: png_header(60_000, 60_000),
    "cut.png": lambda: png_header(64, 64)[:40],
    "escape\x1b[2J.png": lambda: b"nothing",
    "x" * 200 + ".png": lambda: b"nothing",
}


class Watch:
    """An audit hook that notes forbidden events while it is on.

    allowed: folders below which files may be written. forbidden: folders from which nothing may be imported.
    """

    def __init__(self, allowed: list[str], forbidden: list[str]) -> None:
        self.allowed, self.forbidden = [os.path.realpath(path) for path in allowed], forbidden
        self.on, self.events = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        self.on = False  # what follows here is our own
        try:
            if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn"):
                if not self._is_git(arguments):
                    self.events.append(f"{event} {arguments[:2]}")
            elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
                self.events.append(f"{event} {arguments[-1]}")
            elif event == "exec" and any(
                folder in getattr(arguments[0], "co_filename", "") for folder in self.forbidden
            ):
                self.events.append(f"code of {arguments[0].co_filename}")
            elif event == "open" and isinstance(arguments[0], str) and self._writes(arguments):
                path = os.path.realpath(arguments[0])
                if not any(path.startswith(folder) for folder in self.allowed):
                    self.events.append(f"open for writing {path}")
        finally:
            self.on = True

    @staticmethod
    def _is_git(arguments: tuple) -> bool:
        """Provenance asks git for the commit of this checkout."""
        words = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else []
        return bool(words) and str(words[0]).endswith("git")

    @staticmethod
    def _writes(arguments: tuple) -> bool:
        mode, flags = arguments[1], arguments[2]
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    programs = {name: import_module(module) for name, module in job["programs"].items()}
    for program in programs.values():  # what they import must not count as a hostile file's time
        for command in program.COMMANDS.values():
            for target in (command.config, command.run, command.presets, command.preview):
                if isinstance(target, str):
                    import_module(target.partition(":")[0])
    for module in job["warm"]:
        import_module(module)
    watch = Watch(job["allowed"], job["forbidden"])
    signal.signal(signal.SIGALRM, give_up)
    for words in job["commands"]:
        out, errors = io.StringIO(), io.StringIO()
        started, before = time.perf_counter(), peak_bytes()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            watch.events, watch.on = [], True
            signal.alarm(job["patience"])
            try:
                status: object = programs[words[0]].run(words[1:])
            except SystemExit as stop:
                status = stop.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"[:500]
            watch.on = False
            signal.alarm(0)
        row = {
            "words": words, "status": status, "out": out.getvalue(), "err": errors.getvalue(), "events": watch.events,
            "seconds": time.perf_counter() - started, "bytes": peak_bytes() - before,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


class Hung(BaseException):
    """A command takes too long; no handler of errors may catch this."""


def give_up(*_: object) -> None:
    raise Hung


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
