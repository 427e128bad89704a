"""Build the page's WebAssembly from its text: python tests/build_decoder.py. test_html.py checks that the bytes are these."""

from __future__ import annotations

from pathlib import Path

import wasmtime

PAGE = Path(__file__).parents[1] / "src" / "smalllm" / "export" / "page"


def built() -> bytes:
    """decoder.wat as a module."""
    return bytes(wasmtime.wat2wasm((PAGE / "decoder.wat").read_text(encoding="utf-8")))


if __name__ == "__main__":
    (PAGE / "decoder.wasm").write_bytes(built())
