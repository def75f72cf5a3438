"""The compiled planner where it is built (csrc/planner), else None and the numpy one stands in."""

try:
    from mmkernels import _planner
except ImportError:  # no compiler at install time; `python -m mmkernels.build` builds it later
    _planner = None

BACKEND = "cpp" if _planner is not None else "numpy"
