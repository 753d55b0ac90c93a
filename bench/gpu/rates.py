"""The rates that all other figures are compared with: memory, matrix units and host link, as measured here."""

from __future__ import annotations

from gpu.harness import Target, copy_bytes_per_s, host_to_device_bytes_per_s, matrix_flops_per_s

BUDGET_S = 20.0
TARGETS = (
    Target(name="copy_bandwidth", claim="device-to-device copy of 1 GiB, bytes read plus bytes written", unit="GB/s"),
    Target(name="matrix_rate", claim="bf16 product of 8192 x 8192 random matrices", unit="TFLOP/s"),
    Target(name="host_link", claim="copy of 1 GiB from pinned host memory", unit="GB/s"),
)


def measure(budget_s: float) -> dict[str, float]:
    return {
        "copy_bandwidth": copy_bytes_per_s() / 1e9,
        "matrix_rate": matrix_flops_per_s() / 1e12,
        "host_link": host_to_device_bytes_per_s() / 1e9,
    }
