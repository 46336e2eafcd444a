"""Lanes in, reports and records out. torch and transformers; knows no Ray."""
