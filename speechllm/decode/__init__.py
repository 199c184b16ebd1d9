"""Speech to text with a trained model: searches over the language-model seam, CTC, context, word times, formats."""
