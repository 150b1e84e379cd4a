"""Every test gives the same answer each time: hypothesis draws the same examples, and does not mind how long one takes.

`--hypothesis-profile default` draws others, to look for what these miss.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same-each-time", derandomize=True, deadline=None)
settings.load_profile("same-each-time")
