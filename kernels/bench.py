"""What each kernel costs, and how far that is from what the chip allows: python -m kernels.bench

Without a GPU: every kernel is compiled ahead of time for sm_80 and sm_90 and its machine code is
counted. Instructions over the issue rate and bytes over the bandwidth are two times an element; the
larger is the limit. With a GPU, also: time, at sizes from one batch to 2^28 elements, against that
limit, against plain torch and against torch.compile.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

from . import noising, posterior, rng
from .rng import BLOCK, WARPS

# instructions of one thread a second: SMs x 4 schedulers x 32 lanes x clock; bytes a second
CHIPS = {
    80: ("A100 40 GB", 108 * 128 * 1.41e9, 1.555e12),  # data sheet
    90: ("H200", 132 * 128 * 1.98e9, 4.3e12),  # bandwidth as measured by a copy
}
WHERE = {"seed": "i64", "sample": "*i64", "numel": "i32"}
BATCH = {"index": "*i64", "t_ptr": "*i64", "coef_ptr": "*fp32", "draw": "*i64"} | WHERE
STEP = {"x_s_ptr": "*fp32", "x_t_ptr": "*fp32", "coef_ptr": "*fp32", "step": "*i64"} | WHERE


class Case(NamedTuple):
    """A kernel with the types of its arguments (those left out are None) and the bytes it moves for
    an element."""

    name: str
    kernel: object
    types: dict
    bytes: int


CASES = (
    Case("normal", rng.normal_kernel, {"z_ptr": "*fp32", "draw": "i32"} | WHERE, 4),
    Case("uniform", rng.uniform_kernel, {"u_ptr": "*fp32", "draw": "i32"} | WHERE, 4),
    Case("q_sample uint8 to fp32", noising.q_sample_kernel,
         {"x_t_ptr": "*fp32", "x_0_ptr": "*u8"} | BATCH, 5),
    Case("q_sample uint8 to bf16", noising.q_sample_kernel,
         {"x_t_ptr": "*bf16", "x_0_ptr": "*u8"} | BATCH, 3),
    Case("q_sample fp32 to fp32", noising.q_sample_kernel,
         {"x_t_ptr": "*fp32", "x_0_ptr": "*fp32"} | BATCH, 8),
    Case("noise_loss fp32", noising.noise_loss_kernel,
         {"loss_ptr": "*fp32", "grad_ptr": "*fp32", "out_ptr": "*fp32", "x_0_ptr": "*u8"} | BATCH,
         9),
    Case("noise_loss bf16", noising.noise_loss_kernel,
         {"loss_ptr": "*fp32", "grad_ptr": "*bf16", "out_ptr": "*bf16", "x_0_ptr": "*u8"} | BATCH,
         5),
    Case("posterior_step fp32", posterior.posterior_step_kernel, {"out_ptr": "*fp32"} | STEP, 12),
    Case("posterior_step bf16 out", posterior.posterior_step_kernel, {"out_ptr": "*bf16"} | STEP,
         10),
    Case("posterior_step restoring", posterior.posterior_step_kernel,
         {"out_ptr": "*fp32", "value_ptr": "*fp32"} | STEP, 16),
    Case("posterior_step 2M", posterior.posterior_step_kernel,
         {"out_ptr": "*fp32", "x0_prev_ptr": "*fp32"} | STEP, 20),
)


# ------------------------------------------------------------------------------------ static


def machine_code(case, capability):
    """The kernel's SASS up to its last EXIT, an instruction to a string: what follows is padding.
    Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = case.kernel.arg_names
    types = {name: case.types.get(name, "constexpr") for name in names}
    constants = {"stream": 0, "BLOCK": BLOCK}
    constants = {(i,): constants.get(n) for i, n in enumerate(names) if types[n] == "constexpr"}
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
    found = {}
    for line in code:
        if m := re.search(rf"\b{opcode}\.E(\S*)", line):
            width = re.search(r"\.[US]?(8|16|64|128)\b", m[1])
            bits = int(width[1]) if width else 32
            found[bits] = found.get(bits, 0) + 1
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
        print(f"{'kernel':<24}{'instr./el.':>11}{'limit':>7}{'B/el.':>7}{'limit':>7}  "
              f"{'loads (n x bits)':<20}{'stores':<14}{'local':>5}{'registers':>10}")
        for case in CASES:
            r = static(case, capability)
            print(f"{case.name:<24}{r['instructions']:>11.1f}{r['by_issue'] / 1e9:>7.0f}"
                  f"{r['bytes']:>7}{r['by_bandwidth'] / 1e9:>7.0f}  {widths(r['loads']):<20}"
                  f"{widths(r['stores']):<14}{r['local']:>5}{r['registers']:>10}")


# ------------------------------------------------------------------------------------ on a GPU


class Inputs(NamedTuple):
    """What the timed operations take, each what it needs of it."""

    x_0: torch.Tensor  # uint8 [N, 1, 28, 28]
    index: torch.Tensor  # int64 [N], a permutation
    t: torch.Tensor  # int64 [N]
    x: torch.Tensor  # float32 [N, 1, 28, 28]: x_t, or the noise that plain torch must keep
    out: torch.Tensor  # float32 [N, 1, 28, 28]
    forward: torch.Tensor  # float32 [T, 5]
    reverse: torch.Tensor  # float32 [S, 7]
    draw: torch.Tensor  # int64 []


def inputs(images, device):
    """Random numbers throughout: on zeros kernels can be faster than on data."""
    shape = (images, 1, 28, 28)
    x_0 = torch.randint(256, shape, dtype=torch.uint8, device=device)
    x, out = torch.randn(2, *shape, device=device)
    return Inputs(x_0, torch.randperm(images, device=device),
                  torch.randint(1000, (images,), device=device), x, out,
                  torch.rand(1000, 5, device=device), torch.rand(50, 7, device=device),
                  torch.zeros((), dtype=torch.int64, device=device))


def normal(s):
    return rng.normal(s.x.shape, 1, 0, s.draw, rng.TRAIN_NOISE, s.x.device)


def normal_plain(s):
    return torch.randn_like(s.x)


def q_sample(s):
    return noising.q_sample(s.x_0, s.index, s.t, s.forward, 1, 0, s.draw)


def q_sample_plain(s):
    signal, noise = s.forward[s.t, :2, None, None, None].unbind(1)
    return signal * (s.x_0[s.index].float() / 127.5 - 1) + noise * torch.randn_like(s.x)


def noise_loss(s):
    """Both passes at once, as the kernel does it."""
    function = noising.noise_loss_triton if rng.fused(s.x) else noising.noise_loss_ref
    return function(s.out, s.x_0, s.index, s.t, s.forward, 1, 0, s.draw)


def noise_loss_plain(s):
    p, q, weight = s.forward[s.t, 2:5, None, None, None].unbind(1)
    error = s.out - p * (s.x_0[s.index].float() / 127.5 - 1) - q * s.x
    return weight.flatten() * error.square().mean((1, 2, 3)), error * (2 / 784 * weight)


def posterior_step(s):
    return posterior.posterior_step(s.x, s.out, s.reverse, s.draw, 1, 0)


def posterior_step_plain(s):
    a, b, c0, ct, sigma, *_ = s.reverse[0]
    x0_hat = (a * s.x + b * s.out).clamp(-1, 1)
    return c0 * x0_hat + ct * s.x + sigma * torch.randn_like(s.x)


# by the name of the case that gives the limit: our operation, and the same in plain torch
TIMED = {
    "normal": (normal, normal_plain),
    "q_sample uint8 to fp32": (q_sample, q_sample_plain),
    "noise_loss fp32": (noise_loss, noise_loss_plain),
    "posterior_step fp32": (posterior_step, posterior_step_plain),
}


def median_seconds(operation, sets, graph, repeats=20):
    """Median seconds of operation(s) over passes through `sets`, between device events; recorded
    as a CUDA graph first if `graph`, as the program's loops run it, else launched one by one."""
    def once():
        for s in sets:
            operation(s)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.synchronize()
    work = once
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=side):
            once()
        work = recorded.replay
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return statistics.median(times)


def print_timed(sizes=(128 * 784, 2**20, 2**24, 2**28)):
    """Rotates among inputs that together exceed twice the L2 cache, so that none is found there.
    Plain torch is launched call by call, as it is used; ours and the compiled one are recorded."""
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_properties(device)
    capability = 10 * gpu.major if 10 * gpu.major in CHIPS else max(CHIPS)
    lanes = BLOCK * rng.triton.cdiv(196, BLOCK) / 196
    print(f"\n{gpu.name}, sm_{gpu.major}{gpu.minor}; images of 28x28, which leave lanes idle: "
          f"instructions x {lanes:.2f}; medians; limits of an {CHIPS[capability][0]}")
    print(f"{'kernel':<24}{'elements':>11}{'us':>10}{'GB/s':>7}{'of limit':>9}{'x plain':>9}"
          f"{'x compiled':>11}")
    cases = {case.name: case for case in CASES}
    for name, (ours, plain) in TIMED.items():
        row = static(cases[name], capability)
        limit = min(row["by_issue"] / lanes, row["by_bandwidth"])
        for size in sizes:
            images = size // 784
            elements = images * 784
            torch.cuda.empty_cache()
            if 40 * elements > torch.cuda.mem_get_info()[0]:
                print(f"{name:<24}{elements:>11}  left out: too large for this GPU's memory")
                continue
            copies = min(64, 1 + 2 * gpu.L2_cache_size // (row["bytes"] * elements))
            sets = [inputs(images, device) for _ in range(copies)]
            torch.compiler.reset()
            seconds = [median_seconds(f, sets, graph) for f, graph in (
                (ours, True), (plain, False), (torch.compile(plain, dynamic=False), True))]
            print(f"{name:<24}{elements:>11}{seconds[0] * 1e6:>10.2f}"
                  f"{row['bytes'] * elements / seconds[0] / 1e9:>7.0f}"
                  f"{elements / seconds[0] / limit:>9.0%}{seconds[1] / seconds[0]:>9.2f}"
                  f"{seconds[2] / seconds[0]:>11.2f}", flush=True)


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
