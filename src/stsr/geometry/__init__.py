"""Where things lie: grid, measurement and outlines; all arithmetic between um and bins. No input or output."""
