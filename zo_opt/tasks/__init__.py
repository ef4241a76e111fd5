"""Rows to losses and metrics: files and built-in data, prompts and label words, scoring, evaluation."""
