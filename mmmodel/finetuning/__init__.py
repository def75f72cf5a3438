"""Fine-tuning: a pretrained encoder with a new output layer, trained on labelled samples."""
