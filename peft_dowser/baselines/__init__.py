"""The systems that Dowser is compared with, on the same deltas: post-merges, learned grafting, SPIDER.

May import delta and base.
"""

from .grafting import learn_graft
from .postmerge import dare, graft, tailor, top_delta, wise_ft
from .spider import SpiderCallback

__all__ = ["SpiderCallback", "dare", "graft", "learn_graft", "tailor", "top_delta", "wise_ft"]
