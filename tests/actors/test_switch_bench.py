"""The switch benchmark's arguments, and that its figures come out of what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import switch
from switch_growth import Footprint, Growth


def test_the_defaults_are_those_of_the_published_results() -> None:
    args = switch.parse([])
    assert (args.dtype, args.switches, args.out) == ("bfloat16", 10_000, None)
    assert switch.parse(["--out", "x/y.md", "--layers", "2"]).out == Path("x/y.md")


@pytest.mark.parametrize("argument", ["--layers", "--threads", "--rounds", "--cold-rounds", "--switches"])
def test_a_count_below_one_is_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        switch.parse([argument, "0"])
    assert f"{argument} must be at least 1" in capsys.readouterr().err


def test_ratios_say_which_is_faster() -> None:
    samples = switch.Samples()
    names = "memcpy", "loader alone", "switch, whole", "resident step", "switch and first step", "resident switch"
    for name in (
        *names,
        "cold polymux",
        "cold transformers",
        "cold safetensors, read only",
        "small switch and step",
        "cold polymux, image",
        "cold polymux, load",
        "cold polymux, step",
    ):
        samples.seconds[name] = [2.0]
    samples.seconds["loader alone"] = [4.0, 5.0, 3.0]
    samples.seconds["cold transformers"] = [1.0]
    footprints = [Footprint(num_switches=n, allocated_bytes=1, private_bytes=1, num_fds=1, weight_spans=1, weight_bytes=1) for n in (0, 9)]
    text, figures = switch.report(switch.parse([]), samples, 1 << 30, Growth(footprints, 2.0))
    assert figures["copy_ratio"] == 0.5 and figures["cold_vs_transformers"] == 0.5 and figures["growth_bytes"] == 0
    assert "4000.0 (3000.0 to 5000.0)" in text
