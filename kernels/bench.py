"""What each kernel costs, and how far that is from what the chip allows: python -m kernels.bench

Without a GPU: every kernel is compiled ahead of time for sm_80 and sm_90 and its machine code is
counted. Instructions over the issue rate and bytes over the bandwidth are two times an element; the
larger is the limit. With a GPU, also: time against that limit, plain torch and torch.compile.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import torch

from . import noising, posterior, rng
from .rng import BLOCK, WARPS

# instructions of one thread a second: SMs x 4 schedulers x 32 lanes x clock; bytes a second
CHIPS = {
    80: ("A100 40 GB", 108 * 128 * 1.41e9, 1.555e12),  # data sheet
    90: ("H200", 132 * 128 * 1.98e9, 4.3e12),  # bandwidth as measured by a copy
}
TYPES = {  # of the kernels' arguments, by name
    **dict.fromkeys("x_t_ptr x_s_ptr out_ptr grad_ptr loss_ptr table_ptr".split(), "*fp32"),
    **dict.fromkeys("index t_ptr sample draw step".split(), "*i64"),
    "x_0_ptr": "*u8", "seed": "i64", "numel": "i32",
}


class Case(NamedTuple):
    """A kernel, the bytes that it moves for an element, and the types that differ from TYPES."""

    name: str
    kernel: object
    bytes: int
    types: dict = {}


CASES = (
    Case("normal", rng.normal_kernel, 4, {"z_ptr": "*fp32", "draw": "i32"}),
    Case("uniform", rng.uniform_kernel, 4, {"u_ptr": "*fp32", "draw": "i32"}),
    Case("q_sample uint8 to fp32", noising.q_sample_kernel, 5),
    Case("q_sample uint8 to bf16", noising.q_sample_kernel, 3, {"x_t_ptr": "*bf16"}),
    Case("q_sample fp32 to fp32", noising.q_sample_kernel, 8, {"x_0_ptr": "*fp32"}),
    Case("noise_loss fp32", noising.noise_loss_kernel, 9),
    Case("noise_loss bf16", noising.noise_loss_kernel, 5,
         {"grad_ptr": "*bf16", "out_ptr": "*bf16"}),
    Case("posterior_step fp32", posterior.posterior_step_kernel, 12),
    Case("posterior_step bf16 out", posterior.posterior_step_kernel, 10, {"out_ptr": "*bf16"}),
    Case("q_sample, bridge", noising.q_sample_kernel, 9, {"prior_ptr": "*fp32"}),
    Case("noise_loss, bridge", noising.noise_loss_kernel, 13, {"prior_ptr": "*fp32"}),
    Case("posterior_step 2M", posterior.posterior_step_kernel, 20, {"x0_prev_ptr": "*fp32"}),
    Case("posterior_step 2M, bridge", posterior.posterior_step_kernel, 24,
         {"x0_prev_ptr": "*fp32", "prior_ptr": "*fp32"}),
)


def machine_code(case, capability):
    """The kernel's SASS up to its last EXIT, an instruction to a string: what follows is padding.
    Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    # An argument without a type is a constant: the stream, the block, or a tensor that is None.
    names = case.kernel.arg_names
    types = {name: (TYPES | case.types).get(name, "constexpr") for name in names}
    constants = {(i,): {"stream": 0, "BLOCK": BLOCK}.get(name) for i, name in enumerate(names)
                 if types[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if types[name][0] == "*" or name == "numel"}  # as at a launch, for 28 x 28

    program = compile(ASTSource(case.kernel, types, constants, aligned),
                      target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        text = subprocess.run([rng.triton.knobs.nvidia.nvdisasm.path, "-c", file.name], check=True,
                              capture_output=True, text=True).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)
    return code[:1 + max(i for i, line in enumerate(code) if re.search(r"\bEXIT\b", line))]


def accesses(code, opcode):
    """How many accesses of global memory are how many bits wide: {128: 4, 32: 2}."""
    found = Counter()
    for line in code:
        if m := re.search(rf"\b{opcode}\.E(\S*)", line):
            width = re.search(r"\.[US]?(8|16|64|128)\b", m[1])
            found[int(width[1]) if width else 32] += 1
    return dict(sorted(found.items(), reverse=True))


def static(case, capability):
    """What the machine code says of a kernel: per element, and as elements a second of the chip."""
    code = machine_code(case, capability)
    instructions = len(code) * 32 * WARPS / (4 * BLOCK)  # every thread runs straight through
    _, issue, bandwidth = CHIPS[capability]
    return {"instructions": instructions, "bytes": case.bytes,
            "by_issue": issue / instructions, "by_bandwidth": bandwidth / case.bytes,
            "loads": accesses(code, "LDG"), "stores": accesses(code, "STG"),
            "local": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code),
            "registers": 1 + max(int(r) for line in code for r in re.findall(r"\bR(\d+)\b", line))}


def print_static():
    def widths(found):
        return " ".join(f"{n}x{bits}" for bits, n in found.items()) or "-"

    for capability, (chip, issue, bandwidth) in CHIPS.items():
        print(f"\nsm_{capability}: machine code of one thread, which serves "
              f"{4 * BLOCK // (32 * WARPS)} elements; limits in G elements/s of an {chip}: "
              f"{issue / 1e12:.1f} T instructions/s, {bandwidth / 1e12:.2f} TB/s")
        print(f"{'kernel':<26}{'instr./el.':>11}{'limit':>7}{'B/el.':>7}{'limit':>7}  "
              f"{'loads (n x bits)':<20}{'stores':<14}{'local':>5}{'registers':>10}")
        for case in CASES:
            r = static(case, capability)
            print(f"{case.name:<26}{r['instructions']:>11.1f}{r['by_issue'] / 1e9:>7.0f}"
                  f"{r['bytes']:>7}{r['by_bandwidth'] / 1e9:>7.0f}  {widths(r['loads']):<20}"
                  f"{widths(r['stores']):<14}{r['local']:>5}{r['registers']:>10}")


def inputs(images, device):
    """Random numbers throughout: on zeros kernels can be faster than on data."""
    shape = (images, 1, 28, 28)
    return SimpleNamespace(
        x_0=torch.randint(256, shape, dtype=torch.uint8, device=device),
        index=torch.randperm(images, device=device),
        t=torch.randint(1000, (images,), device=device),
        x=torch.randn(shape, device=device),  # x_t, or the eps that plain torch must keep
        out=torch.randn(shape, device=device),
        forward=torch.rand(1000, 6, device=device),
        reverse=torch.rand(50, 7, device=device),
        draw=torch.zeros((), dtype=torch.int64, device=device))


def q_sample_plain(s):
    signal, noise = s.forward[s.t, :2, None, None, None].unbind(1)
    return signal * (s.x_0[s.index].float() / 127.5 - 1) + noise * torch.randn_like(s.x)


def noise_loss_plain(s):
    """Loss and gradient at once, as the kernel does it."""
    p, q, weight = s.forward[s.t, 2:5, None, None, None].unbind(1)
    error = s.out - p * (s.x_0[s.index].float() / 127.5 - 1) - q * s.x
    return weight.flatten() * error.square().mean((1, 2, 3)), error * (2 / 784 * weight)


def posterior_step_plain(s):
    a, b, c0, ct, sigma, *_ = s.reverse[0]
    x0_hat = (a * s.x + b * s.out).clamp(-1, 1)
    return c0 * x0_hat + ct * s.x + sigma * torch.randn_like(s.x)


TIMED = {  # by the name of the case that gives the limit: ours, and the same in plain torch
    "normal": (lambda s: rng.normal(s.x.shape, 1, 0, s.draw, rng.TRAIN_NOISE, s.x.device),
               lambda s: torch.randn_like(s.x)),
    "q_sample uint8 to fp32": (
        lambda s: noising.q_sample(s.x_0, s.index, s.t, s.forward, 1, 0, s.draw), q_sample_plain),
    "noise_loss fp32": (
        lambda s: noising.noise_loss_triton(s.out, s.x_0, s.index, s.t, s.forward, 1, 0, s.draw),
        noise_loss_plain),
    "posterior_step fp32": (
        lambda s: posterior.posterior_step(s.x, s.out, s.reverse, s.draw, 1, 0),
        posterior_step_plain),
}


def print_timed(sizes=(128 * 784, 2**20, 2**24, 2**26)):
    """Medians of replays of a CUDA graph, as the program's loops run. A graph passes through inputs
    that together exceed twice the L2 cache, so that none is found there."""
    from triton.testing import do_bench_cudagraph

    gpu = torch.cuda.get_device_properties(0)
    capability = 10 * gpu.major if 10 * gpu.major in CHIPS else max(CHIPS)
    lanes = BLOCK * rng.blocks(784) / 196
    print(f"\n{gpu.name}, sm_{gpu.major}{gpu.minor}; images of 28x28, which leave lanes idle: "
          f"instructions x {lanes:.2f}; medians; limits of an {CHIPS[capability][0]}")
    print(f"{'kernel':<26}{'elements':>11}{'us':>10}{'GB/s':>7}{'of limit':>9}{'x plain':>9}"
          f"{'x compiled':>11}")
    for (name, (ours, plain)), size in itertools.product(TIMED.items(), sizes):
        row = static({case.name: case for case in CASES}[name], capability)
        elements = size // 784 * 784
        copies = min(64, 1 + 2 * gpu.L2_cache_size // (row["bytes"] * elements))
        sets = [inputs(elements // 784, "cuda") for _ in range(copies)]
        torch.cuda.synchronize()  # the benchmark's own stream does not wait for the inputs
        torch.compiler.reset()
        seconds, *others = [
            do_bench_cudagraph(lambda: [f(s) for s in sets], return_mode="median") / 1e3 / copies
            for f in (ours, plain, torch.compile(plain, dynamic=False))]

        limit = min(row["by_issue"] / lanes, row["by_bandwidth"])
        print(f"{name:<26}{elements:>11}{seconds * 1e6:>10.2f}"
              f"{row['bytes'] * elements / seconds / 1e9:>7.0f}{elements / seconds / limit:>9.0%}"
              f"{others[0] / seconds:>9.2f}{others[1] / seconds:>11.2f}", flush=True)


def main():
    if rng.triton is None:
        sys.exit("kernels.bench: Triton is not installed")
    if rng.triton.knobs.runtime.interpret:
        sys.exit("kernels.bench: unset TRITON_INTERPRET: the interpreter makes no machine code")
    print(f"torch {torch.__version__}, triton {rng.triton.__version__}")
    print_static()
    if torch.cuda.is_available():
        print_timed()
    else:
        print("\nno GPU here: nothing was timed")


if __name__ == "__main__":
    main()
