"""What was read, cut and packed, as lines for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_like.data import cache

if TYPE_CHECKING:
    from arctic_like.data.prepare import Cut, Prepared

_POLICY = {
    "error": "refused",
    "drop": "dropped",
    "truncate_left": "cut at their start",
    "truncate_right": "cut at their end",
    "split": "split",
}


def report(sets: dict[str, Prepared], cut: Cut) -> str:
    """One line for each set and for each thing in it that a user should know of."""
    lines: list[str] = []
    for name, prepared in sets.items():
        facts = prepared.facts
        share = facts["trained_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
        filled = f", {facts['fill_rate']:.1%} filled" if cut.pack else ""
        lines.append(
            f"{name}: {facts['documents']:,} documents → {facts['samples']:,} samples of up to "
            f"{facts['max_length']:,} tokens{filled}; {facts['tokens']:,} tokens, "
            f"{share:.1%} trained"
        )
        if facts["long"]:
            policy = _POLICY[cut.long_samples]
            lines.append(f"  {facts['long']:,} documents were too long and {policy}")
        if facts["cut_to_nothing"]:
            count = facts["cut_to_nothing"]
            lines.append(f"  {count:,} of them kept no trained token and were dropped")
        if facts["untrained"]:
            count = facts["untrained"]
            lines.append(f"  {count:,} documents have no trained token and were dropped")
        lines += _about_turns(prepared)
    return "\n".join(lines)


def _about_turns(prepared: Prepared) -> list[str]:
    read = [cache.facts(part.folder) for part in prepared.samples.documents]
    endless = sum(facts.get("endless", 0) for facts in read)
    straddling = sum(facts.get("straddling", 0) for facts in read)
    lines = []
    if endless:
        lines.append(
            f"  {endless:,} answers have no end-of-turn token in this chat template: the model "
            "does not learn to stop"
        )
    if straddling:
        lines.append(f"  {straddling:,} tokens hold the end of a header and the start of an answer")
    return lines
