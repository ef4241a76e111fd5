"""The frozen base model: loading, precision, quantisation, compilation."""
