"""The finding of an evaluation in one sentence: which settings to use, and whether the H&E helps."""

from __future__ import annotations

import pandas as pd

from stsr.verbs.evaluate.ways import KRIGED, MODEL, WHITE

SCORE = "pcc"


def sentence(ways: pd.DataFrame, section: str) -> tuple[str, str]:
    """Choose the way that predicts scattered spots best, unless kriging is as good.

    Parameters
    ----------
    ways
        As `stsr.verbs.evaluate.verb.Evaluation.ways`.
    section
        Name of the section.

    Returns
    -------
    best, verdict
        Label of the way, and the sentence.
    """
    usable = ways[ways["options"] != ""]
    scattered = usable[usable["hidden"] == "scattered"].set_index("way")
    ranked = scattered[SCORE].sort_values(ascending=False)
    best = str(ranked.index[0])
    ahead = scattered.loc[best, f"{SCORE}_gain_low"] > 0
    if best != KRIGED and not ahead:
        found = (
            f"on {section}, no way predicts hidden spots better than kriging of denoised spots beyond chance "
            f"({best}: {_signed(scattered.loc[best])}); use: stsr superres {scattered.loc[KRIGED, 'options']}"
        )
        return KRIGED, found + _image(ways)
    row = scattered.loc[best]
    gain = "" if best == KRIGED else f", {_signed(row)} against kriging of denoised spots"
    options = f"stsr superres {row['options']}".strip()
    return best, f"on {section}, use: {options} (PCC of hidden spots {row[SCORE]:.3f}{gain})" + _image(ways)


def _image(ways: pd.DataFrame) -> str:
    """Whether the H&E helps the model, where spots have neighbours and where they have none."""
    found = []
    for kind, where in (("scattered", "between spots"), ("blocks", "away from spots")):
        part = ways[ways["hidden"] == kind].set_index("way")
        if WHITE not in part.index:
            return ""
        seeing = part.loc[MODEL]
        found.append(f"{seeing[SCORE] - part.loc[WHITE, SCORE]:+.3f} {where}")
    return f"; the H&E changes the model's PCC by {' and '.join(found)}"


def _signed(row: pd.Series) -> str:
    return (
        f"{row[f'{SCORE}_gain']:+.3f} ({row[f'{SCORE}_gain_low']:+.3f} to {row[f'{SCORE}_gain_high']:+.3f})"
    )
