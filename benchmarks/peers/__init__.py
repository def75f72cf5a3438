"""One file per peer: NAME, missing(problem) -> reason or None, build(problem) -> Implementation."""
