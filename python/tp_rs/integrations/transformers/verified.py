"""Types that the sweep ran over ranks with the results of the whole model. Made by its command."""

VERIFIED: frozenset[str] = frozenset()
