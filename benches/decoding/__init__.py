"""Whole models on GPUs beside transformers and their matrix products alone: the parts of models_on_gpu.py."""
