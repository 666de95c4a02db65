"""Products are IEEE fp32, or accumulate fp16 in fp32, whatever the process was set to; and that is given back."""

import subprocess
import sys

import pytest
import torch

from muon8bit.orthogonalize import NSMethod, orthogonalize, resolve_coefficients
from muon8bit.orthogonalize.products import accumulating_in_fp32

# A process of its own: torch refuses to read one generation of settings once the other has been written.
PROGRAM = """
import torch
from muon8bit.orthogonalize import NSMethod, newton_schulz, orthogonalize, products, resolve_coefficients

def read():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

seen = []
original = products.Products.symmetric
def spy(self, *args, **options):
    seen.append(read())
    return original(self, *args, **options)
products.Products.symmetric = spy
{setting}
before = read()
x = torch.randn(1, 64, 128) / 100
orthogonalize(x, resolve_coefficients("jordan", 5), NSMethod("gram", torch.float32, "vendor", (5,)))
assert len(seen) > 5 and set(seen) == {{({inside!r}, {mkldnn_inside!r})}}, seen
assert read() == before == ({outside!r}, {mkldnn_outside!r}), (before, read())
{check}
print("done")
"""


@pytest.mark.parametrize(
    ("setting", "outside", "mkldnn_outside", "inside", "mkldnn_inside", "check"),
    [
        (
            'torch.set_float32_matmul_precision("medium")',
            *("tf32", "bf16", "ieee", "ieee"),
            'assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32',
        ),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32", "none", "ieee", "none", ""),
        ('torch.backends.cuda.matmul.fp32_precision = "tf32"', "tf32", "none", "ieee", "none", ""),
        ("", "none", "none", "none", "none", 'assert torch.get_float32_matmul_precision() == "highest"'),
    ],
)
def test_fp32_products_are_ieee_and_settings_come_back(setting, outside, mkldnn_outside, inside, mkldnn_inside, check):
    program = PROGRAM.format(
        setting=setting,
        outside=outside,
        mkldnn_outside=mkldnn_outside,
        inside=inside,
        mkldnn_inside=mkldnn_inside,
        check=check,
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"


@pytest.mark.parametrize(("accumulation", "reduction"), [(False, True), (True, True), (True, False), (False, False)])
def test_fp16_sums_stay_in_fp32_and_settings_come_back(accumulation, reduction):
    matmul = torch.backends.cuda.matmul
    found = matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction
    try:
        matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction = accumulation, reduction
        with accumulating_in_fp32(torch.float16):
            assert not matmul.allow_fp16_accumulation
            assert not matmul.allow_fp16_reduced_precision_reduction
        assert matmul.allow_fp16_accumulation is accumulation
        assert matmul.allow_fp16_reduced_precision_reduction is reduction
    finally:
        matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction = found


def test_autocast_does_not_reach_the_iteration():
    x = torch.randn(1, 32, 64) / 50
    path = NSMethod("gram", torch.float32, "vendor", (5,))
    plain = orthogonalize(x.clone(), resolve_coefficients("jordan", 5), path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(x, resolve_coefficients("jordan", 5), path), plain)
