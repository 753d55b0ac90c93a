"""Figures of the Aegaeon artifact's own simulator (SOSP '25), to compare with: 16 H100, seed 0, its request lists.

Per point qos, tok and req in percent, as `polymux.disagg.sim.outcome` defines them, then requests given up; None: not reported. `wrr` is
its simulation of Aegaeon with 6 prefill and 10 decode devices, which moves by 0.2 from run to run.
"""

from __future__ import annotations

Row = tuple[float, float | None, float | None, int | None]

PUBLISHED: dict[str, dict[str, Row]] = {
    "16x0.1": {"sllm": (100, 100, 100, 0), "sllm-oracle": (100, 100, 100, 0), "wrr": (100, 100, 100, None)},
    "24x0.1": {"sllm": (98.8, 99.0, 98.7, 2), "sllm-oracle": (100, 100, 100, 0), "wrr": (100, 100, 100, None)},
    "32x0.1": {"sllm": (96.6, 99.1, 96.0, 2), "sllm-oracle": (100, 100, 100, 0), "wrr": (100, 100, 99.7, None)},
    "40x0.1": {"sllm": (92.3, 97.3, 90.6, 2), "sllm-oracle": (99.5, 99.8, 98.9, 0), "wrr": (100, 100, 100, None)},
    "48x0.1": {"sllm": (75.1, 86.6, 72.8, 62), "sllm-oracle": (47.2, 42.1, 32.9, 190), "wrr": (99.7, 99.9, 98.2, None)},
    "64x0.1": {"sllm": (56.1, 69.4, 53.0, 198), "sllm-oracle": (26.3, 21.2, 13.3, 380), "wrr": (94.6, 95.7, 70.4, None)},
    "80x0.1": {"sllm": (47.7, 61.9, 44.6, 309), "sllm-oracle": (15.4, 12.9, 6.6, 549), "wrr": (84.3, 85.1, 45.3, None)},
    "40x0.3": {"sllm": (38.5, None, None, 274), "sllm-oracle": (18.1, None, None, 329), "wrr": (97.4, None, 80.6, None)},
    "40x0.5": {"sllm": (25.2, 37.2, 22.2, 553), "sllm-oracle": (13.5, 11.5, 2.6, 582), "wrr": (94.5, 96.1, 67.6, None)},
    "40x0.7": {"sllm": (22.1, None, None, 908), "sllm-oracle": (9.3, None, None, 985), "wrr": (95.1, None, 68.3, None)},
}

HALF_SLO: dict[str, dict[str, Row]] = {
    "48x0.1": {"sllm": (61.6, None, None, None), "wrr": (95.0, None, None, None)},
    "64x0.1": {"sllm": (43.8, None, None, None), "wrr": (79.0, None, None, None)},
    "80x0.1": {"sllm": (34.1, None, None, None), "wrr": (60.4, None, None, None)},
}
