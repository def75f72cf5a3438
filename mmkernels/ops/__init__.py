"""One folder per operator, each with the same file names: api, op, reference and the implementations."""
