"""What a method needs in memory, before anything is downloaded: estimates in closed form."""

from zo_opt.planning.plan import Footprint, Setting, plan_method
from zo_opt.planning.skeleton import make_skeleton, read_config

__all__ = ["Footprint", "Setting", "make_skeleton", "plan_method", "read_config"]
