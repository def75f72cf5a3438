"""packing: rows of ragged streams into one packed sequence and back, gathered rows, segment means, packing plans."""
