"""What a trained model looks at in one sample, and what it loses without a part of it."""
