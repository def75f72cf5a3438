"""The commands of mmmodel: what makes and scores runs, and what uses them."""
