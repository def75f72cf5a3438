"""modality_embed: gather each token's row, add modality and position rows, normalise, write the packed [T, E] once."""
