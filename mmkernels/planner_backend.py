"""The compiled planner where it is built (csrc/planner), else the same functions in numpy."""

from mmkernels import packs_numpy, planner_numpy

try:
    from mmkernels import _planner
except ImportError:  # no compiler at install time; `python -m mmkernels.build` builds it later
    BACKEND, layouts, packs = "numpy", planner_numpy, packs_numpy
else:
    BACKEND, layouts, packs = "cpp", _planner, _planner
