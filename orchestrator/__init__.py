"""Distributed experiment orchestration for LoRA-variant studies, on Ray."""
