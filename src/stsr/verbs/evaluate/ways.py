"""The ways of making a map that are compared on a slide."""

from __future__ import annotations

from dataclasses import dataclass

from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.spots import AUTO, DENOISED, EXACT, NONE, RAW


@dataclass(frozen=True)
class Way:
    """One way of making a map.

    Parameters
    ----------
    label
        In tables and figures.
    loaded
        Method or model.
    spots, consistency
        As in `stsr.superres`, resolved.
    sees_image
        False shows a white slide instead of the H&E.
    adapt_steps
        Steps by which the model is adapted to the visible spots first; 0 for none.
    base
        As in `stsr.superres`.
    options
        Options of ``stsr superres`` that make maps this way; empty if there are none.
    """

    label: str
    loaded: Loaded
    spots: str
    consistency: str
    sees_image: bool = True
    adapt_steps: int = 0
    base: str = AUTO
    options: str = ""

    @property
    def inputs(self) -> tuple[int, str, bool, int]:
        """Ways with equal inputs differ in what is done to the finished map only."""
        return id(self.loaded), self.spots, self.sees_image, self.adapt_steps


RAW_BILINEAR = "bilinear, raw"
BILINEAR = "bilinear, denoised"
KRIGED = "kriged, denoised"
MODEL = "model, denoised"
WHITE = f"{MODEL}, no H&E"
ADAPTED = f"{MODEL}, adapted"


def ways_of(
    bilinear: Loaded, kriged: Loaded, model: Loaded | None, model_options: str, adapt_steps: int = 0
) -> list[Way]:
    """List interpolation and kriging, and the model, if there is one, with raw and denoised spots and consistency.

    Parameters
    ----------
    bilinear, kriged
        The methods that need no image.
    model
        The model to compare with it.
    model_options
        How ``stsr superres`` is given this model.
    adapt_steps
        Steps of adapting the model to the slide; 0 leaves that way out.
    """
    found = [
        Way(label, method, spots, NONE, options=f"--method {name} --spots {spots} --consistency none")
        for label, name, method, spots in (
            (RAW_BILINEAR, "bilinear", bilinear, RAW),
            (BILINEAR, "bilinear", bilinear, DENOISED),
            (KRIGED, "kriged", kriged, DENOISED),
        )
    ]
    if model is None:
        return found
    for spots, consistency in ((RAW, NONE), (RAW, EXACT), (DENOISED, NONE), (DENOISED, DENOISED)):
        label = f"model, {spots}" + (", consistent" if consistency != NONE else "")
        options = f"{model_options} --spots {spots} --consistency {consistency} --adapt off".strip()
        found.append(Way(label, model, spots, consistency, options=options))
    if adapt_steps:
        options = f"{model_options} --spots {DENOISED} --consistency {NONE} --adapt {adapt_steps}".strip()
        found.append(Way(ADAPTED, model, DENOISED, NONE, adapt_steps=adapt_steps, options=options))
    return [*found, Way(WHITE, model, DENOISED, NONE, sees_image=False)]
