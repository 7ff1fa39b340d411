"""What tests read from compiled programs."""

from __future__ import annotations

import jax


def text_of(program: jax.stages.Compiled) -> str:
    """Return the optimised program as text."""
    text = program.as_text()
    assert text is not None
    return text


def flops_of(program: jax.stages.Compiled) -> float:
    """Return the floating-point operations that XLA counts; it counts the body of a loop once."""
    analysis = program.cost_analysis()
    assert analysis is not None
    return analysis["flops"]
