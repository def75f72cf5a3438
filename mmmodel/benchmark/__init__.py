"""The benchmark `stamps`: what pretraining on the stamps is worth, for retrieval and for classification."""
