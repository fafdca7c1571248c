"""Pre-training data: tokenize text into Megatron's indexed datasets and identify what made them."""
