"""What an engine process has to import before it can load anything."""

import subprocess
import sys

CODE = """
import sys
import server.engine.__main__
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
import bitsandbytes.functional, torch
values = torch.linspace(-1, 1, 64)
codes, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")
back = bitsandbytes.functional.dequantize_4bit(codes, state)  # one that would be compiled
print((back - values).abs().max().item() < 0.2)
"""


def test_an_engine_starts_without_a_compiler_and_what_is_not_compiled_works() -> None:
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert said.stdout.split("\n") == ["[]", "True", ""]
